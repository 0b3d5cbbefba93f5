"""Files made to do harm: refused with a sentence, in little memory and time, and no code in them ever runs."""

import ast
import collections
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jaxtyping
import numpy as np
import pytest
import torch
from bounds import little_memory, little_time
from loaders import LOADERS, TENSORS, written
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import cddlib
from cddbook import profiles
from cddbook.records import read_record
from cddbook.study import study_record
from cddlib.data.download import prepare
from cddlib.data.pictures import read_picture
from cddlib.exchange.torch_files import LARGEST_PICKLE, read_torch_file
from cddlib.runtime.config import as_dict
from cddlib.runtime.errors import UserError
from cddlib.runtime.files import verify_checksum, write_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bounded() -> Iterator[None]:
    """The test has a gigabyte and a minute."""
    with little_memory(), little_time(60):
        yield


# --- No unpickling ----------------------------------------------------------------------------------------------

FORBIDDEN = r"\b(pickle|cPickle|marshal|shelve|joblib|dill|cloudpickle|all_gather_object|broadcast_object_list)\b"


def sources() -> Iterator[tuple[str, str]]:
    """All code of the package, of the book's tools, and of the chapters."""
    for path in [*ROOT.glob("cddlib/**/*.py"), *ROOT.glob("book/**/*.py")]:
        yield path.name, path.read_text()
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        yield path.name, "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def test_nothing_is_unpickled_or_evaluated() -> None:
    for name, source in sources():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not re.search(FORBIDDEN, ast.unparse(node)), (name, ast.unparse(node))
            if isinstance(node, ast.Call):
                called, said = ast.unparse(node.func), (name, ast.unparse(node))
                assert called not in ("eval", "exec", "compile", "__import__", "yaml.load", "os.system"), said
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called != "torch.load" or options.get("weights_only") == "True", said
                assert {options.get("allow_pickle", "False"), options.get("shell", "False")} == {"False"}, said


# --- Files of torch.save ----------------------------------------------------------------------------------------


class Harm:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def archive(path: Path, program: bytes, compression: int = zipfile.ZIP_STORED, extra: str | None = None) -> Path:
    """A file as `torch.save` writes it, with any program."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/version", "3\n")
        if extra:
            file.writestr(extra, b"0")
    return path


PLAIN = pickle.dumps([1, 2], 2)
PROGRAMS: dict[str, tuple[bytes, str]] = {
    "a command": (pickle.dumps(Harm(exec, "open('ran', 'w')"), 2), "it names "),
    "a storage without numbers": (
        pickle.dumps(Harm(torch.UntypedStorage, 10**12), 2),
        "it names torch.storage.UntypedStorage",
    ),
    "a counter": (pickle.dumps(collections.Counter({"a": 1}), 2), "it names collections.Counter"),
    "a set": (pickle.dumps({1, 2}, 4), "its pickle has protocol 4, not 2"),
    "a long number": (b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"\x00.", "cannot be read: "),
    "no end": (b"\x80\x02]", "cannot be read: "),
    "marks": (b"\x80\x02(" + b"(" * 10**6 + b".", "cannot be read: "),
    "a long one": (b"\x80\x02" + b"N" * LARGEST_PICKLE + b".", "its list of tensors has more than 8388608 bytes"),
}
"""What is in an archive's place for the list of tensors, and what the refusal says."""


def itself(path: Path) -> None:
    content: list[Any] = []
    content.append(content)
    torch.save(content, path)


def replaced(path: Path, old: bytes, new: bytes, behind: int = 0) -> None:
    """A valid archive with some bytes changed, that far behind those named."""
    whole = archive(path, PLAIN).read_bytes()
    at = whole.index(old) + behind
    path.write_bytes(whole[:at] + new + whole[at + len(new) :])


SHARED = "tensors that share their numbers"
Write = Callable[[Path], object]
ARCHIVES: dict[str, tuple[Write, str]] = {
    **{name: (lambda path, p=program: archive(path, p), said) for name, (program, said) in PROGRAMS.items()},
    "often the same": (lambda path: torch.save([[torch.zeros(1)]] * 10**5, path), SHARED),
    "more than it holds": (lambda path: torch.save(torch.zeros(1).expand(10**12), path), SHARED),
    "a list of itself": (itself, SHARED),
    "a long list, often": (lambda path: torch.save([[0.5] * 10**4] * 10**4, path), SHARED),
    "a sparse tensor": (lambda path: torch.save(torch.eye(3).to_sparse(), path), "it names torch._utils._rebuild_spa"),
    "compression": (
        lambda path: archive(path, b"\x80\x02" + b"0" * 2**28 + b".", zipfile.ZIP_DEFLATED),
        "its entries are compressed",
    ),
    "a long entry in a short file": (
        lambda path: replaced(path, b"PK\x01\x02", struct.pack("<I", 2**31 - 1), 20),
        "its entries are compressed",
    ),
    "an entry that climbs": (lambda path: archive(path, PLAIN, extra="../../escaped"), "cannot be read: "),
    "an index that is none": (lambda path: replaced(path, b"PK\x01\x02", b"PK\x01\x03"), "cannot be read: "),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounded: None) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    write, said = ARCHIVES[case]
    write(folder / "images_best.pt")
    with pytest.raises(UserError, match=r"images_best\.pt ") as error:
        read_torch_file(folder / "images_best.pt")
    assert said in str(error.value)
    assert [*tmp_path.rglob("*")] == [tmp_path / "a", folder, folder / "images_best.pt"]


def test_files_of_an_old_pytorch_and_deep_lists_are_read(tmp_path: Path, bounded: None) -> None:
    deep = archive(tmp_path / "deep.pt", b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")
    assert isinstance(read_torch_file(deep), list)
    old = read_torch_file(Path(__file__).with_name("labels_of_pytorch_1_13.pt"))
    assert torch.equal(old, torch.arange(4))  # type: ignore[arg-type]


# --- Files without an end, and headers that lie -----------------------------------------------------------------

READERS: dict[str, Callable[[Path], object]] = {
    **{name: loader.read for name, loader in LOADERS.items()},
    "record": read_record,
    "image": lambda path: read_picture(str(path), 4),
}


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", READERS)
def test_pipes_and_devices_are_not_read(name: str, kind: str, tmp_path: Path, bounded: None) -> None:
    path = written(LOADERS[name], tmp_path)[0] if name in LOADERS else tmp_path / "file"
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=str(path)):
        READERS[name](path)


def safetensors(header: dict[str, Any] | bytes, contents: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + contents


KINDS = ("preprocessing", "expert", "unfinished", "difficulty", "synthetic", "state", "dataset")
BOMBS = {
    "a header of exabytes": safetensors(b"{}", length=2**62),
    "a header of a gigabyte": safetensors(b"{}", length=2**30),
    "brackets": safetensors(b"[" * 100_000),
    "a shape of exabytes": safetensors(
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"0000"
    ),
    "no numbers of many": safetensors({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}),
    "numbers of others": safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}}, b"0000"),
    "a sealed list": safetensors({"__metadata__": dict.fromkeys(KINDS, "[]")}),
}


@pytest.mark.parametrize("name", TENSORS)
def test_headers(name: str, tmp_path: Path, bounded: None) -> None:
    path, _ = written(LOADERS[name], tmp_path)
    for bomb in BOMBS.values():
        path.write_bytes(bomb)
        with pytest.raises(UserError, match=re.escape(path.name)):
            LOADERS[name].read(path)


# --- Sealed lies ------------------------------------------------------------------------------------------------


def test_nesting(bounded: None) -> None:
    """Also where Python parses a value that it can no longer print."""
    for depth in (*range(700, 1100), 100_000):
        with pytest.raises(UserError):
            verify_checksum('{"a": ' + "[" * depth + "]" * depth + ', "checksum": "0123456789abcdef"}', "it")


@pytest.mark.parametrize("runs", [["../elsewhere"], ["/etc"], 5, [5], [None], None, [["a"]]])
def test_a_study_that_is_none(runs: object, tmp_path: Path) -> None:
    config = as_dict(cddlib.distill_recipe("contra", "digits", 1))
    write_json(tmp_path / "study.json", {"config": config, "runs": runs, "networks": 0, "buffer_id": "0"})
    with pytest.raises(UserError, match=r"study\.json (names the run .* not below its folder|is not the description)"):
        study_record(tmp_path)


# --- Pictures and archives --------------------------------------------------------------------------------------


def many_scans(path: Path) -> None:
    """Each 33 bytes more are another pass over the image."""
    Image.new("L", (2048, 2048), 100).save(path, "JPEG", progressive=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * 600 + whole[-2:])


def long_text(path: Path) -> None:
    info = PngInfo()
    info.add_text("a", "0" * 2**27, zip=True)
    Image.new("L", (4, 4)).save(path, "PNG", pnginfo=info)


def long_file(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(2**40)  # takes no room on disk


OTHER_FORM = "it is none of BMP, JPEG, PNG, PPM, WEBP"
IMAGES: dict[str, tuple[bytes | Write, str]] = {
    "a long text": (long_text, "Decompressed data too large"),
    "PostScript": (b"%!PS\n(x) print", ""),
    "a thousand bytes, gigapixels when resized": (
        lambda path: Image.new("L", (10**6, 1)).save(path, "PNG"),
        "its sides of 1 and 1000000 pixels make 4096000000, more than 67108864",
    ),
    "many scans": (many_scans, "it has 606 scans, more than 512"),
    "a long file": (long_file, "it has 1099511627776 bytes, more than 268435456"),
    "large": (
        lambda path: Image.new("L", (9000, 9000)).save(path, "PNG"),
        "its sides of 9000 and 9000 pixels make 81000000",
    ),
    "TIFF": (lambda path: Image.new("L", (4, 4)).save(path, "TIFF"), OTHER_FORM),
    "GIF": (lambda path: Image.new("L", (4, 4)).save(path, "GIF"), OTHER_FORM),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images(case: str, tmp_path: Path, bounded: None) -> None:
    write, said = IMAGES[case]
    bad = tmp_path / "bad.png"
    bad.write_bytes(write) if isinstance(write, bytes) else write(bad)
    with pytest.raises(UserError, match=r"bad\.png is not a readable image \(") as error:
        read_picture(str(bad), 64)
    assert said in str(error.value)


def test_planted_files_are_neither_unpacked_nor_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision takes no archive and no pickle without a checksum that it knows."""
    folder = tmp_path / "root" / "downloads"
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    (folder / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Harm(Path.touch, tmp_path / "ran")))
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as file:
        file.addfile(tarfile.TarInfo("../../climbed"))
    monkeypatch.setattr(urllib.request, "urlopen", Mock(side_effect=OSError("no network")))
    with pytest.raises(UserError, match=r"^cifar10 cannot be downloaded to .* \(.*no network.*\)\.$"):
        prepare("cifar10", tmp_path / "root")
    assert os.listdir(tmp_path) == ["root"] and not (tmp_path / "root" / "cifar10.safetensors").exists()


# --- Parameters of chapters -------------------------------------------------------------------------------------


def test_the_chapters_values_are_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it, without checks of types
    for value in ("__import__('os')", 2.5, None, 2**70, [1]):
        with pytest.raises(UserError, match=r"^seed is .*, which is not of type int\.$"):
            cddlib.distill_recipe("contra", "digits", 1, seed=value)
        with pytest.raises(UserError, match="unknown profile"):
            profiles.profile(value)  # type: ignore[arg-type]


def test_the_makefile_hands_a_profile_on_as_it_is(tmp_path: Path) -> None:
    script = "import sys; open('said', 'w').write(repr(sys.argv[1:]))"
    (tmp_path / "Makefile").write_text(re.sub(r"(?m)^\$\(READY\):.*\n(\t.*\n)*", "", (ROOT / "Makefile").read_text()))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / ".ready").touch()
    (tmp_path / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{script}" "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    for value in ("quick; touch ran", "`touch ran`", "'; touch ran; '", "$$(touch ran)", "$(shell touch ran)"):
        subprocess.run(["make", "book", f"PROFILE={value}", f"REPOSITORY={value}"], cwd=tmp_path, capture_output=True)
        assert not (tmp_path / "ran").exists()
        said = ast.literal_eval((tmp_path / "said").read_text())
        assert said[1:] == ["--profile", value, "--repository", value]


def test_grey_of_16_bits_keeps_its_levels(tmp_path: Path) -> None:
    levels = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4369
    Image.fromarray(levels).save(tmp_path / "grey.png")
    found = np.frombuffer(read_picture(str(tmp_path / "grey.png"), 4), np.uint8).reshape(3, 4, 4)
    assert abs(found - levels / 257).max() <= 1

"""Files made to do harm: refused with a sentence, in little memory and time, and no code in them ever runs.

Cases run in processes of their own that may have two gigabytes more than they have at the start, or in this one,
which may have one more.
"""

import ast
import base64
import collections
import dataclasses
import importlib.util
import io
import json
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
import tarfile
import types
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import nbformat
import papermill
import pytest
import torch
from bounds import little_memory, little_time
from children import Child
from PIL import Image

import cddlib
from cddbook import profiles
from cddbook.records import read_record
from cddbook.study import study_record
from cddlib.data.download import prepare
from cddlib.data.pictures import read_picture
from cddlib.evaluate import Trainer
from cddlib.exchange.torch_files import LARGEST_PICKLE, read_torch_file
from cddlib.experts.buffer import DIFFICULTY, Buffer
from cddlib.experts.train import ExpertTraining, read_unfinished
from cddlib.runtime.config import as_dict
from cddlib.runtime.errors import UserError
from cddlib.runtime.files import add_checksum, read_json, read_tensors, verify_checksum, write_json, write_tensors
from cddlib.runtime.run_folder import parse_metrics

ROOT = Path(__file__).resolve().parents[2]
PREPARE = sys.modules["cddlib.data.download"]  # whose function hides it
SPARE = 2 * 2**30


def spare_memory() -> None:
    """Let this process have `SPARE` bytes more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def refused(tmp_path: Path, *arguments: object) -> str:
    """The sentence with which a command refuses; nothing else is printed, and nobody waits for long."""
    child = Child([*arguments], tmp_path / "log", spare_memory)
    assert child.wait(120) == 1, child.said
    lines = [line for line in child.said.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("cddlib: "), child.said
    assert "not enough memory" not in lines[0], lines
    return lines[0]


@pytest.fixture
def bounded() -> Iterator[None]:
    """The test has a gigabyte and a minute."""
    with little_memory(), little_time(60):
        yield


# --- No unpickling ----------------------------------------------------------------------------------------------

FORBIDDEN = r"\b(pickle|cPickle|marshal|shelve|joblib|dill|cloudpickle|all_gather_object|broadcast_object_list)\b"


def sources() -> list[tuple[str, str]]:
    """All code of the package, of the book's tools, and of the chapters."""
    found = [(path.name, path.read_text()) for path in [*ROOT.glob("cddlib/**/*.py"), *ROOT.glob("book/**/*.py")]]
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        found.append((path.name, "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")))
    return found


@pytest.mark.parametrize(("name", "source"), sources(), ids=lambda value: value if "\n" not in value else "")
def test_nothing_is_unpickled_or_evaluated(name: str, source: str) -> None:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not re.search(FORBIDDEN, " ".join(names)), ast.unparse(node)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "yaml.load", "os.system"), name
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called != "torch.load" or options.get("weights_only") == "True", name
            assert options.get("allow_pickle", "False") == "False" and options.get("shell", "False") == "False", name


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


def nested(depth: int) -> bytes:
    """A program for a list in a list in a list …"""
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def doubled(times: int) -> bytes:
    """A program whose list holds 2 ** times others, all of them two names for one."""
    body = b"\x80\x02]q\x00"
    for number in range(times):
        body += b"](h" + bytes([number]) + b"h" + bytes([number]) + b"eq" + bytes([number + 1])
    return body + b"."


PROGRAMS = {
    "a command": pickle.dumps(Harm(exec, "open('ran', 'w')"), 2),
    "an archive's bytes": pickle.dumps(Harm(bytearray, 10**12), 2),
    "a tensor of many numbers": pickle.dumps(Harm(torch.zeros, 10**12), 2),
    "a counter": pickle.dumps(collections.Counter({"a": 1}), 2),
    "a set": pickle.dumps({1, 2}, 4),
    "depth": nested(200_000),
    "doubling": doubled(200),
    "a long number": b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"\x00.",
    "nothing": b"",
    "no end": b"\x80\x02]",
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_programs_for_the_pickle_machine(case: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "images_best.pt", PROGRAMS[case])
    sentence = refused(tmp_path, "import-set", path, path, "--step-size", 0.01, "--out", tmp_path / "out")
    assert "images_best.pt" in sentence and not Path("ran").exists() and not (tmp_path / "out").exists()


def test_archives_that_climb_swell_or_lie(tmp_path: Path) -> None:
    plain = pickle.dumps([1, 2], 2)
    climbing = archive(tmp_path / "climbing.pt", plain, extra="../../escaped")
    swelling = archive(tmp_path / "swelling.pt", b"\x80\x02" + b"0" * 2**28 + b".", zipfile.ZIP_DEFLATED)
    lying = tmp_path / "lying.pt"
    lying.write_bytes(archive(tmp_path / "honest.pt", plain).read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03"))
    for path in (climbing, swelling, lying):
        arguments = ("import-set", path, path, "--step-size", 0.01, "--out", tmp_path / "out")
        assert path.name in refused(tmp_path, *arguments)
    assert not list(tmp_path.parent.glob("escaped")) and not list(tmp_path.parent.parent.glob("escaped"))
    assert read_torch_file(tmp_path / "honest.pt") == [1, 2]


def test_tensors_that_promise_more_than_they_hold(tmp_path: Path) -> None:
    one = torch.zeros(1).expand(10**12)
    torch.save(one, tmp_path / "images_best.pt")
    assert "images_best.pt" in refused(
        tmp_path,
        "import-set",
        tmp_path / "images_best.pt",
        tmp_path / "images_best.pt",
        *("--step-size", 0.01, "--out", tmp_path / "out"),
    )


FROM_1_13 = """
eNp9UkFPwjAYbdexzXIwwNUYjpggEP0HxHCpiRNjQrwso2vmYsPoVjh74cBREy8ePPo7/At69ur/sGNDxsB9yfKa9b33va+tTZAOgGWBnWqAQ8DdMeOx
E3Kv67nS7Uwf+KBfBXebetSoDCN633FmMuAxdiI2ngXccySbxGHkzM+wAK3WyFSOsWK6PhMwleDLcOLfpP+w0EZQUXoCjZBCOp0JnehSVK4JIPpCGAQu
hLmkNOScURmEkxhfRR6LmHcRUImFdTIUB1Lgoah2bGJa79+v7otySj773yFroF0cstsb9Fv5EUtrbQQz1DJEGSZRcB08NdW6WRqlrvZzUeYsitWUg/5R
aZZznHT4fPNvtay7TeAqxLpH/iAaO1333HDRIB+/tiX+2TXo9oryfLb6lnwKwZ6JbWIY7YxxjE7/2KiAHxl+wfVJG8kjA8/a5kZsUjFSDVrxU+4vsFqR
Vw==
"""  # `torch.save(torch.arange(4), "labels_old.pt")` by PyTorch 1.13.1, compressed


def test_a_file_of_an_old_pytorch_is_read_and_its_damage_noticed(tmp_path: Path) -> None:
    whole = zlib.decompress(base64.b64decode(FROM_1_13))
    path = tmp_path / "labels_best.pt"
    path.write_bytes(whole)
    assert torch.equal(read_torch_file(path), torch.arange(4))  # type: ignore[arg-type]
    at = whole.index(b"\x03" + bytes(7))  # the last number
    path.write_bytes(whole[:at] + b"\x02" + whole[at + 1 :])
    with pytest.raises(
        UserError, match=r"labels_best\.pt cannot be read: its entry labels_old/data/0 does not have the CRC"
    ):
        read_torch_file(path)


def overlapping(path: Path) -> None:
    """A thousand tensors in the place of one: four gigabytes to look through in a file of four megabytes."""
    numbers = torch.zeros(10**6)
    torch.save([numbers[start:] for start in range(1000)], path)


def squared(path: Path) -> None:
    """Ten thousand times the same list of as many: 10^8 places to walk through."""
    torch.save([[0.5] * 10**4] * 10**4, path)


def itself(path: Path) -> None:
    content: list[Any] = []
    content.append(content)
    torch.save(content, path)


def swollen(path: Path) -> None:
    """An entry of a few bytes that says it takes two gigabytes of the file, which are asked for when it is read."""
    whole = archive(path, pickle.dumps([1, 2], 2)).read_bytes()
    size = whole.index(b"PK\x01\x02") + 20
    path.write_bytes(whole[:size] + struct.pack("<I", 2**31 - 1) + whole[size + 4 :])


SHARED = "tensors that share their numbers"
PT: dict[str, tuple[Callable[[Path], object], str]] = {
    "overlapping tensors": (overlapping, SHARED),
    "often the same": (lambda path: torch.save([[torch.zeros(1)]] * 10**5, path), SHARED),
    "a list of itself": (itself, SHARED),
    "a long list, often": (squared, SHARED),
    "a long pickle": (
        lambda path: archive(path, b"\x80\x02" + b"N" * LARGEST_PICKLE + b"."),
        "its list of tensors has more than 8388608 bytes",
    ),
    "marks": (lambda path: archive(path, b"\x80\x02(" + b"(" * 10**6 + b"."), "cannot be read: "),
    "a storage without numbers": (
        lambda path: archive(path, pickle.dumps(Harm(torch.UntypedStorage, 10**12), 2)),
        "it names torch.storage.UntypedStorage",
    ),
    "a sparse tensor": (lambda path: torch.save(torch.eye(3).to_sparse(), path), "it names torch._utils._rebuild_spa"),
    "a tensor without numbers": (lambda path: torch.save(torch.ones(8, device="meta"), path), "it names torch._utils"),
    "compression": (
        lambda path: archive(path, b"\x80\x02" + b"N" * 10**6 + b".", zipfile.ZIP_DEFLATED),
        "its entries are compressed",
    ),
    "a long entry in a short file": (swollen, "its entries are compressed"),
}


@pytest.mark.parametrize("case", PT)
def test_archives_that_cost_too_much(case: str, tmp_path: Path, bounded: None) -> None:
    write, message = PT[case]
    write(tmp_path / "images_best.pt")
    with pytest.raises(UserError, match=r"images_best\.pt ") as error:
        read_torch_file(tmp_path / "images_best.pt")
    assert message in str(error.value)


# --- Files without an end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    "read",
    [
        read_json,
        read_record,
        read_torch_file,
        lambda path: read_picture(str(path), 4),
        lambda path: read_tensors(path, "synthetic"),
        lambda path: parse_metrics(path, ""),
    ],
    ids=["json", "record", "pt", "image", "tensors", "metrics"],
)
def test_pipes_and_devices_are_not_read(
    read: Callable[[Path], object], kind: str, tmp_path: Path, bounded: None
) -> None:
    path = tmp_path / "file"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=str(path)):
        read(path)


# --- safetensors ------------------------------------------------------------------------------------------------


def safetensors(header: dict[str, Any] | bytes, contents: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + contents


BOMBS = {
    "a header of exabytes": safetensors(b"{}", length=2**62),
    "a header of a gigabyte": safetensors(b"{}", length=2**30),
    "brackets": safetensors(b"[" * 100_000),
    "a shape of exabytes": safetensors(
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"0000"
    ),
    "no numbers of many": safetensors({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}),
    "numbers of others": safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}}, b"0000"),
    "a sealed list": safetensors({"__metadata__": dict.fromkeys(("synthetic", "state", "expert", "dataset"), "[]")}),
}


@pytest.mark.parametrize("case", BOMBS)
def test_headers(case: str, buffer: Buffer, quick: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = cddlib.distill_recipe("mtt", "digits", 1, **quick)
    cddlib.distill(config, buffer, run, device="cpu")
    (run / "synthetic.safetensors").write_bytes(BOMBS[case])
    assert "synthetic.safetensors" in refused(tmp_path, "evaluate", run, "--runs", 1)
    (run / "checkpoint.safetensors").write_bytes(BOMBS[case])
    (run / "result.json").unlink()
    options = [f"--{name.replace('_', '-')}={value}" for name, value in quick.items()]
    again = ("distill", "--method", "mtt", "--ipc", 1, *options, "--buffer", buffer.folder, "--out", run)
    assert "checkpoint.safetensors" in refused(tmp_path, *again)
    (tmp_path / "cifar10.safetensors").write_bytes(BOMBS[case])
    data = ("buffer", "--data", "cifar10", "--root", tmp_path, "--out", tmp_path / "b")
    assert "cifar10.safetensors" in refused(tmp_path, *data)


# --- Sealed lies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 10**9),
        ("width", True),
        ("depth", 10**9),
        ("epochs", 10**15),
        ("experts", 10**15),
        ("network", "nothing"),
        ("network", ["convnet"]),
        ("augment", "__import__('os').system('true')"),
        ("zca", "yes"),
    ],
)
def test_absurd_buffers(field: str, value: object, buffer: Buffer, tmp_path: Path) -> None:
    manifest = {"config": {**buffer.config, field: value}, "data": buffer.data, "experts": buffer.experts}
    write_json(tmp_path / "b" / "buffer.json", manifest)
    found = refused(tmp_path, "export", tmp_path / "b", "--to", tmp_path / "out", "--form", "pt")
    assert "buffer.json" in found or field in found


@pytest.mark.parametrize(("field", "value"), [("shape", [1, 10**9, 10**9]), ("classes", 10**12), ("shape", [])])
def test_absurd_images_of_a_buffer(field: str, value: object, buffer: Buffer, tmp_path: Path) -> None:
    manifest = {"config": buffer.config, "data": {**buffer.data, field: value}, "experts": buffer.experts}
    write_json(tmp_path / "b" / "buffer.json", manifest)
    with pytest.raises(UserError):
        Buffer(tmp_path / "b")


def test_a_set_without_images(tmp_path: Path) -> None:
    tensors = {
        "images": torch.zeros(0, 1, 8, 8),
        "labels": torch.zeros(0, dtype=torch.int64),
        "step_size": torch.tensor(0.1),
        "preprocessing.mean": torch.zeros(1),
        "preprocessing.std": torch.ones(1),
    }
    write_tensors(tmp_path / "s.safetensors", tensors, "synthetic", {"classes": [], "subsets": 1})
    with pytest.raises(UserError, match=r"s\.safetensors is not a synthetic set"):
        cddlib.SyntheticSet.load(tmp_path / "s.safetensors")


def test_nesting_in_a_sealed_file(tmp_path: Path) -> None:
    path = tmp_path / "buffer.json"
    path.write_text('{"config":' + "[" * 100_000 + "]" * 100_000 + f', "checksum": "{add_checksum({})["checksum"]}"}}')
    with pytest.raises(UserError, match=r"buffer\.json"):
        Buffer(tmp_path)


def test_lists_nested_almost_too_deeply(bounded: None) -> None:
    """Where Python parses a value that it can no longer print."""
    for depth in range(700, 1100):
        with pytest.raises(UserError):
            verify_checksum('{"a": ' + "[" * depth + "]" * depth + ', "checksum": "0123456789abcdef"}', "it")


GOOD = {"snapshots": torch.zeros(3, 5), "momentum": torch.zeros(5)}


@pytest.mark.parametrize(
    ("tensors", "header"),
    [
        ({**GOOD, "snapshots": torch.zeros(3, 6)}, {}),
        ({**GOOD, "snapshots": torch.zeros(3, 5).double()}, {}),
        ({"momentum": torch.zeros(5)}, {}),
        ({**GOOD, "more": torch.zeros(5)}, {}),
        (GOOD, {"losses": None}),
        (GOOD, {"losses": [1.0] * 10**6}),
        (GOOD, {"accuracies": {"0": 1}}),
    ],
)
def test_an_unfinished_expert_that_is_none(
    tensors: dict, header: dict[str, Any], tmp_path: Path, bounded: None
) -> None:
    path, theta = tmp_path / "u.safetensors", torch.zeros(5)
    said = {"buffer": "0", "losses": [1.0, 0.5], "accuracies": [0.1, 0.2, 0.3]}
    write_tensors(path, GOOD, "unfinished", said)
    assert read_unfinished(path, "0", theta, torch.optim.SGD([theta]))[1:] == (said["losses"], said["accuracies"])
    write_tensors(path, tensors, "unfinished", {**said, **header})
    with pytest.raises(UserError, match=r"u\.safetensors is not an unfinished expert, and can be deleted \("):
        read_unfinished(path, "0", theta, torch.optim.SGD([theta]))


@pytest.mark.parametrize("tensors", [{}, {"el2n": torch.zeros(3)}, {"el2n": torch.zeros(1437).double()}])
def test_a_difficulty_that_is_none(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    ranked = types.SimpleNamespace(
        folder=tmp_path,
        config=None,
        train=cddlib.load("digits").train,
        ranks=types.SimpleNamespace(first=True, wait=lambda: None),
    )
    write_tensors(tmp_path / DIFFICULTY, tensors, "difficulty")
    with pytest.raises(
        UserError, match=r"difficulty\.safetensors does not hold the difficulty of \d+ images; delete it"
    ):
        ExpertTraining._difficulty_rank(ranked)  # type: ignore[arg-type]


@pytest.mark.parametrize("runs", [["../elsewhere"], ["/etc"], 5, [5], [None], {}, None, [["a"]]])
def test_a_study_that_is_none(runs: object, tmp_path: Path) -> None:
    config = as_dict(cddlib.distill_recipe("contra", "digits", 1))
    write_json(tmp_path / "study.json", {"config": config, "runs": runs, "networks": 0, "buffer_id": "0"})
    if runs == {}:
        assert study_record(tmp_path)["runs"] == {}
        return
    with pytest.raises(UserError, match=r"study\.json (names the run .* not below its folder|is not the description)"):
        study_record(tmp_path)


def test_a_set_of_another_data_set_is_not_tested(buffer: Buffer, quick: dict[str, Any], tmp_path: Path) -> None:
    config = cddlib.distill_recipe("mtt", "digits", 1, **quick)
    found = cddlib.distill(config, buffer, tmp_path, device="cpu")
    dataclasses.replace(found, classes=tuple("abcdefghij")).save(tmp_path / "synthetic.safetensors")
    with pytest.raises(
        UserError, match=r"synthetic\.safetensors has other classes, or images of another shape, than digits"
    ):
        Trainer(tmp_path, None, root=None, device="cpu")


# --- Pictures and archives --------------------------------------------------------------------------------------


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG that promises so many pixels of one colour, and begins with some rows of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" * (width // 8 + 1)) for _ in range(min(height, 1000))) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def text_chunk(size: int) -> bytes:
    """A compressed text of that many bytes."""
    data = b"a\0\0" + zlib.compress(b"0" * size, 9)
    return struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))


@pytest.mark.parametrize(
    "picture",
    [png(50_000, 50_000), png(2, 100_000_000), png(8, 8, text_chunk(2**27)), b"%!PS\n(x) print", b"GIF89a"],
    ids=["2.5 gigapixels", "a thin one", "text", "PostScript", "no GIF"],
)
def test_pictures(picture: bytes, tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / "pictures" / part / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / part / "a" / "0.png")
    (tmp_path / "pictures" / "train" / "a" / "bad.png").write_bytes(picture)
    arguments = ("data", "imagefolder", "--source", tmp_path / "pictures", "--size", 8, "--root", tmp_path / "out")
    assert "bad.png is not a readable image" in refused(tmp_path, *arguments)


def thin(path: Path) -> None:
    """A thousand bytes, which would be four gigapixels when their shorter side is resized to 64."""
    Image.new("L", (10**6, 1)).save(path, "PNG")


def many_scans(path: Path) -> None:
    """Each 33 bytes more are another pass over the image."""
    Image.new("L", (2048, 2048), 100).save(path, "JPEG", progressive=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * 600 + whole[-2:])


def long_file(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(2**40)  # takes no room on disk


IMAGES = {
    thin: "its sides of 1 and 1000000 pixels make 4096000000, more than 67108864",
    many_scans: "it has 606 scans, more than 512",
    long_file: "it has 1099511627776 bytes, more than 268435456",
    lambda path: Image.new("L", (9000, 9000)).save(path, "PNG"): "its sides of 9000 and 9000 pixels make 81000000",
    lambda path: Image.new("L", (4, 4)).save(path, "TIFF"): "it is none of BMP, JPEG, PNG, PPM, WEBP",
    lambda path: Image.new("L", (4, 4)).save(path, "GIF"): "it is none of BMP, JPEG, PNG, PPM, WEBP",
}


@pytest.mark.parametrize("write", IMAGES, ids=range(len(IMAGES)))
def test_images_that_cost_too_much(write: Callable[[Path], object], tmp_path: Path, bounded: None) -> None:
    for part in ("train", "val"):
        (tmp_path / "images" / part / "a").mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "images" / part / "a" / "0.png")
    write(tmp_path / "images" / "train" / "a" / "bad.png")
    with pytest.raises(UserError, match=r"bad\.png is not a readable image \(") as error:
        prepare("imagefolder", tmp_path / "root", source=tmp_path / "images")
    assert IMAGES[write] in str(error.value)


def test_annotations_that_climb(tmp_path: Path) -> None:
    path = tmp_path / "val_annotations.txt"
    for name in ("../../secret.png", "/etc/secret.png", "..", ""):
        path.write_text(f"{name}\tn01\t0\t0\t1\t1\n")
        with pytest.raises(
            UserError, match=r"val_annotations\.txt names '.*', which is not a file beside the others\.$"
        ):
            PREPARE._annotated(path, {"n01": 0})


def offline(*_: object, **__: object) -> None:
    raise OSError("no network")


def test_planted_files_of_fashion_mnist_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision would take unpacked files without a checksum; its own first ones were made by `torch.save`."""
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    folder = tmp_path / "downloads" / "FashionMNIST"
    (folder / "raw").mkdir(parents=True)
    for part, n in (("train", 3), ("t10k", 2)):
        (folder / "raw" / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + bytes(784 * n))
        (folder / "raw" / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + bytes(n))
    with pytest.raises(UserError, match="fashion_mnist cannot be downloaded"):
        prepare("fashion_mnist", tmp_path)
    (folder / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save(Harm(Path.touch, tmp_path / "ran"), folder / "processed" / name)
    with pytest.raises(UserError, match="fashion_mnist cannot be downloaded"):
        prepare("fashion_mnist", tmp_path)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "fashion_mnist.safetensors").exists()


def test_a_planted_archive_is_neither_unpacked_nor_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "downloads"
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    harm = pickle.dumps(Harm(Path.touch, tmp_path / "ran"))
    (folder / "cifar-10-batches-py" / "data_batch_1").write_bytes(harm)
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as file:
        for name in ("../../climbed", "cifar-10-batches-py/data_batch_1"):
            entry = tarfile.TarInfo(name)
            entry.size = len(harm)
            file.addfile(entry, io.BytesIO(harm))

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(UserError, match="cifar10 cannot be downloaded"):
        prepare("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists() and not list(tmp_path.parent.glob("**/climbed"))


# --- Parameters of chapters -------------------------------------------------------------------------------------

CODE = [
    "__import__('os').mkdir('ran')",
    "'); __import__('os').mkdir('ran') #",
    '"""\n__import__("os").mkdir("ran")\n"""',
]


@pytest.mark.parametrize("value", CODE)
@pytest.mark.parametrize("flag", ["-p", "-r", "-y"])
def test_a_value_is_not_code(flag: str, value: str, tmp_path: Path) -> None:
    cells = [
        nbformat.v4.new_code_cell("profile = 'ci'", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("assert isinstance(profile, str), profile"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "a.ipynb")
    given = [json.dumps({"profile": value})] if flag == "-y" else ["profile", value]
    command = [sys.executable, "-m", "papermill", "a.ipynb", "out.ipynb", flag, *given, "--prepare-only"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    injected = next(
        cell.source
        for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells
        if "injected-parameters" in cell.metadata.get("tags", [])
    )
    names: dict[str, Any] = {}
    exec(injected, {}, names)
    assert names == {"profile": value} and not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def build() -> types.ModuleType:
    """book/build.py as a module."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "book" / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_name_would_be_code_and_the_build_refuses_it(build: types.ModuleType, tmp_path: Path) -> None:
    """Papermill writes names into the notebook as they are: who takes them from others has to know them all."""
    name = "a = __import__('os').mkdir('ran'); b"
    source = ROOT / "notebooks" / "06_cifar10.ipynb"
    command = [sys.executable, "-m", "papermill", str(source), "out.ipynb", "-p", name, "1", "--prepare-only"]
    said = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert f"Passed unknown parameter: {name}" in said.stderr
    assert f"{name} = 1" in (tmp_path / "out.ipynb").read_text()
    with pytest.raises(ValueError, match=r"has no parameter a = __import__"):
        build.execute(source, tmp_path / "o.ipynb", {name: 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("segments", CODE[0]),
        ("segments", 2.5),
        ("segments", None),
        ("seed", CODE[1]),
        ("seed", 2**70),
        ("segments", [1]),
    ],
)
def test_the_chapters_values_are_refused_in_a_sentence(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it, without checks of types
    with pytest.raises(UserError, match=rf"^{name} is .*, which is not of type int\.$"):
        cddlib.distill_recipe("contra", "digits", 1, **{name: value})
    for other in (CODE[0], None, ["quick"], {}):
        with pytest.raises(UserError, match="unknown profile"):
            profiles.profile(other)  # type: ignore[arg-type]


def test_the_makefile_hands_a_profile_on_as_it_is(tmp_path: Path) -> None:
    script = "import sys; open('said', 'w').write(repr(sys.argv[1:]))"
    (tmp_path / "Makefile").write_text(re.sub(r"(?m)^\$\(READY\):.*\n(\t.*\n)*", "", (ROOT / "Makefile").read_text()))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / ".ready").touch()
    (tmp_path / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{script}" "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    for value in ("quick; touch ran", "`touch ran`", "'; touch ran; '", "$$(touch ran)", "$(shell touch ran)"):
        subprocess.run(["make", "book", f"PROFILE={value}"], cwd=tmp_path, capture_output=True)
        assert not (tmp_path / "ran").exists()
        assert ast.literal_eval((tmp_path / "said").read_text())[-1] == value


def test_chapters_refuse_other_profiles() -> None:
    for path in ROOT.glob("notebooks/*.ipynb"):
        declared = papermill.inspect_notebook(str(path))
        assert "profile" in declared and ast.literal_eval(declared["profile"]["default"]) == "quick", path

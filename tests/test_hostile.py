"""Files made to do harm: refused with a sentence, in little memory and time, and no code in them ever runs.

Each case runs in a process of its own that may have two gigabytes more than it has at the start.
"""

import ast
import collections
import io
import json
import pickle
import re
import resource
import struct
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
import torch
from children import Child
from PIL import Image

import cddlib
from cddlib.files import UserError, seal, write_json, write_tensors
from cddlib.prepare import prepare
from cddlib.torch_files import read_torch_file
from cddlib.trajectory import Buffer

ROOT = Path(__file__).resolve().parent.parent
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


# --- No unpickling ----------------------------------------------------------------------------------------------

FORBIDDEN = r"\b(pickle|cPickle|marshal|shelve|joblib|dill|cloudpickle|all_gather_object|broadcast_object_list)\b"


def sources() -> list[tuple[str, str]]:
    """All code of the package, of the book's tools, and of the chapters."""
    found = [(path.name, path.read_text()) for path in [*ROOT.glob("cddlib/*.py"), *ROOT.glob("book/*.py")]]
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
            assert called not in ("eval", "exec", "compile", "__import__", "yaml.load", "torch.load", "os.system"), name
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
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
    path.write_text('{"config":' + "[" * 100_000 + "]" * 100_000 + f', "checksum": "{seal({})["checksum"]}"}}')
    with pytest.raises(UserError, match=r"buffer\.json"):
        Buffer(tmp_path)


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

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

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


def test_the_makefile_hands_a_profile_on_as_it_is(tmp_path: Path) -> None:
    script = "import sys; open('said', 'w').write(repr(sys.argv[1:]))"
    (tmp_path / "Makefile").write_text(re.sub(r"(?m)^\$\(READY\):.*\n(\t.*\n)*", "", (ROOT / "Makefile").read_text()))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / ".ready").touch()
    (tmp_path / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{script}" "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    for value in ("quick; touch ran", "`touch ran`", "'; touch ran; '", "$$(touch ran)"):
        subprocess.run(["make", "book", f"PROFILE={value}"], cwd=tmp_path, capture_output=True)
        assert not (tmp_path / "ran").exists()
        assert ast.literal_eval((tmp_path / "said").read_text())[-1] == value.replace("$$", "$")


def test_chapters_refuse_other_profiles() -> None:
    for path in ROOT.glob("notebooks/*.ipynb"):
        declared = papermill.inspect_notebook(str(path))
        assert "profile" in declared and ast.literal_eval(declared["profile"]["default"]) == "quick", path

"""Preparing data sets: from folders of every layout, resumed after a kill, in little memory; and with torchvision."""

import itertools
import os
import resource
import shutil
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import children
import numpy as np
import pytest
import torch
from PIL import Image
from test_dataset import random_arrays
from works import refusal

from cddlib import load, prepare
from cddlib.data import pictures
from cddlib.data.dataset import Images, fingerprint
from cddlib.runtime.errors import UserError
from cddlib.runtime.files import read_json, write_tensors

MODULE = sys.modules["cddlib.data.download"]  # whose function hides it

# --- Preparing from a folder ------------------------------------------------------------------------------------


def as_tiny_imagenet(folder: Path) -> Path:
    """Bring a folder into Tiny ImageNet's original layout: validation in one folder, with annotations."""
    files = sorted((folder / "val").glob("*/*"))
    rows = [f"{file.name}\t{file.parent.name}\t0\t32\t44\t62\n" for file in files]
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    for file in sorted((folder / "train").glob("*/*")):
        file.parent.joinpath("images").mkdir(exist_ok=True)
        file.rename(file.parent / "images" / file.name)
    (folder / "val" / "images").mkdir()
    for file in files:
        file.rename(folder / "val" / "images" / file.name)
    return folder


def test_tiny_imagenet_in_its_original_layout(tmp_path: Path, folder: Path) -> None:
    wanted = reference(folder, tmp_path / "wanted", 64)
    path = prepare("tiny_imagenet", tmp_path, source=as_tiny_imagenet(folder))
    assert path == tmp_path / "tiny_imagenet.safetensors"
    assert path.read_bytes() == wanted


TINY, FOLDER, IMAGENET = ("tiny_imagenet", 64), ("imagefolder", 8), ("imagenet", 64)
ONLY = "has a size of its own; only imagefolder takes one."


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        (TINY, lambda at: (at / "val/val_annotations.txt").unlink(), "is not in Tiny ImageNet's original layout."),
        (TINY, lambda at: (at / "val/val_annotations.txt").write_text(""), "names no image of the classes in train/."),
        (TINY, lambda at: (at / "val/images/000.png").unlink(), "000.png is not a readable image ("),
        (IMAGENET, lambda at: [*map(shutil.rmtree, (at / "val").iterdir())], "val must hold a folder of images"),
        (IMAGENET, lambda at: (at / "train").rename(at / "x"), "needs --source, a folder that holds train/ and val/"),
        (FOLDER, lambda at: (at / "train/no images").mkdir(), "no images"),
        (FOLDER, lambda at: (at / "train/a/003.png").write_bytes(b""), "003.png is not a readable image ("),
        (FOLDER, lambda at: (at / "val/ç").rename(at / "val/d"), "they differ in ['d', 'ç']"),
        (("imagefolder", 0), bool, "size is 0; it must be at least 1."),
        (("tiny_imagenet", 128), bool, f"size is 128, but tiny_imagenet {ONLY}"),
        (("cifar10", 16), bool, f"size is 16, but cifar10 {ONLY}"),
        (("digits", 64), bool, "digits comes with scikit-learn"),
    ],
)
def test_what_cannot_be_prepared_is_refused(
    tmp_path: Path, folder: Path, what: tuple[str, int], change: Callable, message: str
) -> None:
    name, size = what
    change(as_tiny_imagenet(folder) if name == "tiny_imagenet" else folder)
    assert message in refusal(prepare, name, tmp_path / "root", source=folder, size=size)
    assert not (tmp_path / "root" / f"{name}.safetensors").exists()


# --- Streaming --------------------------------------------------------------------------------------------------

SIZE = 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """300 images in ImageNet's layout, of several sizes and modes, with class names that JSON escapes."""
    rng = np.random.default_rng(0)
    for i in range(300):
        part, name = "train" if i % 5 else "val", ("a", 'b"\\', "ç")[i % 3]
        path = tmp_path / "images" / part / name / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(4, 40, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.convert(("RGB", "L", "RGBA", "1", "P")[i % 7 % 5]).save(path)
    return tmp_path / "images"


def reference(folder: Path, path: Path, size: int = SIZE) -> bytes:
    """The cache made the slow way: one image after the other into a tensor, written by safetensors."""
    tensors = {}
    classes = sorted(found.name for found in (folder / "train").iterdir())
    for part, name in (("train", "train"), ("test", "val")):
        files = [(file, i) for i, label in enumerate(classes) for file in sorted((folder / name / label).iterdir())]
        images = torch.stack([decode(file, size) for file, _ in files])
        tensors |= {f"{part}_images": images, f"{part}_labels": torch.tensor([label for _, label in files])}
    parts = (Images(tensors[f"{part}_images"], tensors[f"{part}_labels"]) for part in ("train", "test"))
    write_tensors(path, tensors, "dataset", {"classes": classes, "fingerprint": fingerprint(*parts)}, digests=False)
    return path.read_bytes()


def decode(file: Path, size: int) -> torch.Tensor:
    """The shorter side resized to `size`, the middle of the longer one."""
    image = Image.open(file).convert("RGB")
    w, h = image.size
    longer = int(size * max(w, h) / min(w, h))
    image = image.resize((size, longer) if h > w else (longer, size), Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return torch.tensor(np.array(image)).permute(2, 0, 1).contiguous()


def make(folder: Path, root: Path, size: int = SIZE) -> bytes:
    return prepare("imagefolder", root, source=folder, size=size).read_bytes()


@pytest.mark.parametrize("error", [MemoryError(), SystemError("error return without exception set")], ids=repr)
def test_want_of_memory_is_no_fault_of_the_image(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Pillow has two ways to say it: a decoder that gets no memory may return without an exception."""
    monkeypatch.setattr(Image.Image, "convert", Mock(side_effect=error))
    with pytest.raises(UserError, match=r"^there is not enough memory to read .*; lower --size, or close other"):
        prepare("imagefolder", tmp_path / "root", source=folder, size=16)


def test_threads_that_cannot_be_started_are_not_waited_for(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, more = threading.Thread.start, itertools.count()

    def limited(thread: threading.Thread) -> None:
        if next(more):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(UserError, match=r"^there is not enough memory \(can't start new thread\); lower --size"):
        prepare("imagefolder", tmp_path / "root", source=folder, size=16)
    assert next(more)


def test_the_file_is_what_safetensors_writes(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many threads decode."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(MODULE, "_BATCH", 64)
    for _ in range(2):  # the second time it is there
        assert make(folder, tmp_path) == reference(folder, tmp_path / "wanted")
    with pytest.raises(UserError, match=rf"has images of {SIZE} pixels, not of 9; delete it first\.$"):
        make(folder, tmp_path, 9)
    left = {"images", "wanted", "imagefolder.safetensors", ".imagefolder.lock"}
    assert {path.name for path in tmp_path.iterdir()} == left


@pytest.mark.parametrize(
    ("change", "size", "left"),
    [
        (lambda folder, root: None, SIZE, 60),
        (lambda folder, root: None, SIZE + 1, 300),
        (lambda folder, root: (folder / "train/a/003.png").rename(folder / "train/a/zzz.png"), SIZE, 300),
        (lambda folder, root: os.truncate(root / "imagefolder.partial", 1000), SIZE, 300),
    ],
    ids=["nothing", "another size", "another image", "shorter"],
)
def test_a_mended_image_lets_the_same_run_go_on_and_another_starts_anew(
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, Path], object],
    size: int,
    left: int,
) -> None:
    file = sorted((folder / "train" / "ç").iterdir())[20]  # somewhere in the middle
    good = file.read_bytes()
    file.write_bytes(good[:40])
    for _ in range(2):  # the second time it goes on, to fail at the same image
        assert refusal(make, folder, tmp_path).startswith(f"{file} is not a readable image (")
        durable = read_json(tmp_path / "imagefolder.progress.json")["images"]
        assert durable == 240  # 60 for testing, two classes of 80, and 20 before it in the third
    file.write_bytes(good)
    change(folder, tmp_path)
    decoded, read_image = [], pictures._read_image
    monkeypatch.setattr(pictures, "_read_image", lambda file, size: decoded.append(file) or read_image(file, size))
    found = make(folder, tmp_path, size)
    assert len(decoded) == left
    assert found == reference(folder, tmp_path / "wanted", size)


def limit_data() -> None:
    """Let the process allocate only 60 MB more than it has now; files that it maps do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    data = next(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (data + 60 * 2**20,) * 2)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, folder: Path) -> None:
    """A thousand images are 187 MB, and as many as wait for the disk at most are 24 MB."""
    many = tmp_path / "many"
    for part, name in itertools.product(("train", "val"), "aç"):
        (many / part / name).mkdir(parents=True)
        source = next((folder / "val" / name).iterdir())
        for i in range(500 if part == "train" else 1):
            (many / part / name / f"{i}.png").hardlink_to(source)
    line = ["data", "imagefolder", "--source", many, "--size", 256, "--root", tmp_path]
    code, said = children.run(line, tmp_path / "log", limit_data)
    assert code == 0, said
    assert (tmp_path / "imagefolder.safetensors").stat().st_size > 187 * 2**20


# --- Preparing with torchvision ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        ("fashion_mnist", "FashionMNIST", (28, 28)),
        ("cifar10", "CIFAR10", (32, 32, 3)),
        ("cifar100", "CIFAR100", (32, 32, 3)),
    ],
)
def test_downloads_as_torchvision_holds_them(
    tmp_path: Path, name: str, kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds no file unpacked beside Fashion-MNIST's archives: no checksum would vouch for one."""
    arrays, beside = random_arrays(shape=shape), tmp_path / "downloads" / "FashionMNIST"
    for file in ("raw/train-images-idx3-ubyte", "raw/train-images-idx3-ubyte.gz", "processed/training.pt"):
        (beside / file).parent.mkdir(parents=True, exist_ok=True)
        (beside / file).touch()

    def fetch(folder: Path, *, train: bool, download: bool) -> types.SimpleNamespace:
        assert (folder, download) == (tmp_path / "downloads", True)
        assert [path.suffix for path in beside.glob("*/*")] == [".gz"]
        images, labels = (arrays[f"{'train' if train else 'test'}_{what}"] for what in ("images", "labels"))
        images = images if images.ndim == 4 else torch.from_numpy(images)
        return types.SimpleNamespace(data=images, targets=labels.tolist(), classes=["a", "b", "c"])

    monkeypatch.setattr(f"torchvision.datasets.{kind}", fetch)
    prepare(name, tmp_path)
    found = load(name, tmp_path)
    assert found.classes == ("a", "b", "c")
    for part, images in (("train", found.train), ("test", found.test)):
        pixels = arrays[f"{part}_images"]
        assert np.array_equal(images.images, pixels.transpose(0, 3, 1, 2) if pixels.ndim == 4 else pixels[:, None])
        assert np.array_equal(images.labels, arrays[f"{part}_labels"])

"""Preparing data sets: from folders of every layout, resumed after a kill, in little memory; and with torchvision."""

import gzip
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cddbook.records import read_record
from cddlib import load, prepare
from cddlib.data.dataset import Images, fingerprint
from cddlib.runtime.errors import UserError
from cddlib.runtime.files import read_json, write_tensors

MODULE = sys.modules["cddlib.data.download"]  # whose function hides it


def random_arrays(seed: int, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """A small data set: 30 training and 9 test images of three classes."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for part, n in (("train", 30), ("test", 9)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(n, dtype=np.int64) % 3
    return arrays


# --- Preparing from a folder ------------------------------------------------------------------------------------

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save_image(path: Path, colour: object, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, quality=95)


def assert_one_colour(image: torch.Tensor, colour: tuple[int, int, int]) -> None:
    difference = image.int() - torch.tensor(colour)[:, None, None]
    assert difference.abs().max() <= 3  # JPEG


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder in Tiny ImageNet's original layout: two classes, validation in one folder with annotations."""
    source = tmp_path / "tiny-imagenet-200"
    for wnid, colour in (("n01", RED), ("n02", GREEN)):
        for i in range(2):
            save_image(source / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", colour)
        (source / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
    rows = []
    for i, (wnid, colour) in enumerate([("n02", GREEN), ("n01", RED), ("n02", GREEN)]):
        save_image(source / "val" / "images" / f"val_{i}.JPEG", colour)
        rows.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (source / "val" / "val_annotations.txt").write_text("".join(rows))
    save_image(source / "test" / "images" / "test_0.JPEG", BLUE)  # unlabelled: not used
    return source


def test_tiny_imagenet_in_its_original_layout(tmp_path: Path, tiny: Path) -> None:
    path = prepare("tiny_imagenet", tmp_path / "root", source=tiny)
    assert path == tmp_path / "root" / "tiny_imagenet.safetensors"
    found = load("tiny_imagenet", tmp_path / "root")
    assert found.classes == ("n01", "n02")
    assert found.shape == (3, 64, 64)
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    assert found.test.labels.tolist() == [1, 0, 1]
    for part in (found.train, found.test):
        for image, label in zip(part.images, part.labels, strict=True):
            assert_one_colour(image, (RED, GREEN)[label])


def test_tiny_imagenet_without_annotations_is_refused(tmp_path: Path, tiny: Path) -> None:
    (tiny / "val" / "val_annotations.txt").unlink()
    with pytest.raises(UserError, match=r"val_annotations\.txt does not exist: .* is not in Tiny ImageNet's original"):
        prepare("tiny_imagenet", tmp_path / "root", source=tiny)
    assert not (tmp_path / "root" / "tiny_imagenet.safetensors").exists()


def test_a_missing_validation_image_is_named(tmp_path: Path, tiny: Path) -> None:
    (tiny / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(UserError, match=r"val_1\.JPEG"):
        prepare("tiny_imagenet", tmp_path / "root", source=tiny)


def test_preparing_writes_nothing_that_loading_refuses(tmp_path: Path, tiny: Path) -> None:
    (tiny / "val" / "val_annotations.txt").write_text("")
    with pytest.raises(UserError):
        prepare("tiny_imagenet", tmp_path / "root", source=tiny)
    assert not (tmp_path / "root" / "tiny_imagenet.safetensors").exists()


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """A folder in ImageNet's layout: images of several sizes and modes."""
    source = tmp_path / "imagenet"
    save_image(source / "train" / "n01" / "wide.JPEG", RED, (50, 20))
    save_image(source / "train" / "n01" / "tall.JPEG", RED, (17, 40))
    save_image(source / "train" / "n02" / "grey.JPEG", 100, (9, 9), "L")
    save_image(source / "train" / "n02" / "transparent.png", (0, 255, 0, 10), (33, 8), "RGBA")
    save_image(source / "val" / "n01" / "a.JPEG", RED, (3, 5))
    save_image(source / "val" / "n02" / "b.png", 1, (16, 16), "1")
    return source


def test_imagenets_layout_with_images_of_any_size_and_mode(tmp_path: Path, imagenet: Path) -> None:
    prepare("imagefolder", tmp_path, source=imagenet, size=16)
    found = load("imagefolder", tmp_path)
    assert found.classes == ("n01", "n02")
    assert found.shape == (3, 16, 16)
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    assert found.test.labels.tolist() == [0, 1]
    colours = [RED, RED, (100, 100, 100), GREEN, RED, (255, 255, 255)]
    for image, colour in zip([*found.train.images, *found.test.images], colours, strict=True):
        assert_one_colour(image, colour)


def test_images_are_cut_in_the_middle_after_resizing_the_shorter_side(tmp_path: Path, imagenet: Path) -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = BLUE
    Image.fromarray(pixels).save(imagenet / "val" / "n01" / "a.png")
    (imagenet / "val" / "n01" / "a.JPEG").unlink()
    prepare("imagefolder", tmp_path, source=imagenet, size=10)
    assert_one_colour(load("imagefolder", tmp_path).test.images[0][:, :, 1:-1], BLUE)  # borders blend


def png_with_a_bad_chunk(good: bytes) -> bytes:
    at = good.index(b"IDAT")
    return good[:at] + b"\x00\x01\x02\x03" + good[at + 4 :]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("wide.JPEG", lambda good: good[: len(good) // 2]),
        ("wide.JPEG", lambda good: b"not an image"),
        ("wide.JPEG", lambda good: b""),
        ("late.png", png_with_a_bad_chunk),
        ("late.png", lambda good: good[:-30]),
    ],
)
def test_a_broken_image_is_named(tmp_path: Path, imagenet: Path, file: str, damage) -> None:
    path = imagenet / "train" / "n01" / file
    save_image(path, RED, (40, 40))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        prepare("imagefolder", tmp_path, source=imagenet, size=16)
    assert str(caught.value).startswith(f"{path} is not a readable image (")
    assert not (tmp_path / "imagefolder.safetensors").exists()


def test_a_broken_image_among_thousands_is_named_in_one_sentence(tmp_path: Path, imagenet: Path) -> None:
    folder = imagenet / "train" / "n01"
    for i in range(1024):  # enough for worker processes
        (folder / f"{i}.JPEG").hardlink_to(folder / "wide.JPEG")
    (folder / "bad.JPEG").write_bytes(b"not an image")
    with pytest.raises(UserError) as caught:
        prepare("imagefolder", tmp_path, source=imagenet, size=8)
    assert str(caught.value).startswith(f"{folder / 'bad.JPEG'} is not a readable image (")
    assert "\n" not in str(caught.value)


def test_thousands_of_images_keep_their_order(tmp_path: Path, imagenet: Path) -> None:
    for i in range(1024):
        folder = imagenet / "train" / ("n01", "n02")[i % 2]
        (folder / f"{i:04d}.JPEG").hardlink_to(folder / ("wide.JPEG", "grey.JPEG")[i % 2])
    prepare("imagefolder", tmp_path, source=imagenet, size=8)
    found = load("imagefolder", tmp_path)
    assert len(found.train.labels) == 1028
    red = found.train.images[:, 0].float().mean((1, 2)) - found.train.images[:, 2].float().mean((1, 2)) > 200
    assert torch.equal(red, found.train.labels == 0)


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagenet", "imagefolder"])
def test_a_source_without_train_and_val_is_refused(tmp_path: Path, name: str) -> None:
    for source in (None, tmp_path / "none"):
        with pytest.raises(UserError, match=rf"{name} needs --source, a folder that holds train/ and val/; got "):
            prepare(name, tmp_path, source=source)


def test_folders_with_different_classes_are_refused(tmp_path: Path, imagenet: Path) -> None:
    save_image(imagenet / "val" / "n03" / "c.png", 0, (8, 8), "L")
    with pytest.raises(UserError, match=r"do not have the same classes; they differ in \['n03'\]"):
        prepare("imagefolder", tmp_path, source=imagenet)


def test_a_class_without_images_is_refused(tmp_path: Path, imagenet: Path) -> None:
    (imagenet / "train" / "n00").mkdir()
    with pytest.raises(UserError, match="n00"):
        prepare("imagefolder", tmp_path, source=imagenet)


def test_a_prepared_file_is_kept(tmp_path: Path, imagenet: Path) -> None:
    path = prepare("imagefolder", tmp_path, source=imagenet, size=16)
    before = path.stat()
    assert prepare("imagefolder", tmp_path) == path
    assert path.stat() == before


def test_imagenet_is_64_pixels_wide(tmp_path: Path, imagenet: Path) -> None:
    prepare("imagenet", tmp_path, source=imagenet)
    found = load("imagenet", tmp_path)
    assert (found.name, found.shape, found.classes) == ("imagenet", (3, 64, 64), ("n01", "n02"))


@pytest.mark.parametrize(("name", "size"), [("imagenet", 32), ("tiny_imagenet", 128), ("cifar10", 16)])
def test_a_size_that_a_data_set_does_not_have_is_refused(tmp_path: Path, imagenet: Path, name: str, size: int) -> None:
    with pytest.raises(UserError, match=f"size is {size}, but {name} has a size of its own; only imagefolder"):
        prepare(name, tmp_path, source=imagenet, size=size)


def test_images_have_at_least_one_pixel(tmp_path: Path, imagenet: Path) -> None:
    with pytest.raises(UserError, match="size is 0; it must be at least 1"):
        prepare("imagefolder", tmp_path, source=imagenet, size=0)


def test_imagenets_validation_images_in_one_folder_are_refused(tmp_path: Path, imagenet: Path) -> None:
    val = imagenet / "val"
    for file in list(val.glob("*/*")):
        file.rename(val / f"ILSVRC2012_val_{file.name}")
        file.parent.rmdir()
    with pytest.raises(UserError) as caught:
        prepare("imagenet", tmp_path, source=imagenet)
    assert str(caught.value).startswith(f"{val} must hold a folder of images for each class, {val}/CLASS/* (")


def test_digits_need_no_preparation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="digits comes with scikit-learn"):
        prepare("digits", tmp_path)


# --- Streaming --------------------------------------------------------------------------------------------------

SIZE = 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """300 images of random pixels in ImageNet's layout, of several sizes, with class names that JSON escapes."""
    rng = np.random.default_rng(0)
    for i in range(300):
        part, name = "train" if i % 5 else "val", ("a", 'b"\\', "ç")[i % 3]
        path = tmp_path / "images" / part / name / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(4, 40, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
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


def noted(root: Path) -> int:
    """The number of images that the record beside an unfinished file says are durable."""
    return read_json(root / "imagefolder.progress.json")["images"]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are decoded from now on, in this process."""
    seen: list[str] = []
    read_image = MODULE._read_image
    monkeypatch.setattr(MODULE, "_read_image", lambda file, size: seen.append(file) or read_image(file, size))
    return seen


@pytest.fixture
def broken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, bytes]:
    """An image somewhere in the middle, broken, and what it was."""
    monkeypatch.setattr(MODULE, "_BATCH", 8)
    file = sorted((folder / "train" / "ç").iterdir())[20]
    good = file.read_bytes()
    file.write_bytes(good[:40])
    return file, good


def test_the_file_is_what_safetensors_writes(tmp_path: Path, folder: Path) -> None:
    assert make(folder, tmp_path) == reference(folder, tmp_path / "wanted")
    assert {path.name for path in tmp_path.iterdir()} == {
        "images",
        "wanted",
        "imagefolder.safetensors",
        ".imagefolder.lock",
    }


PAUSED = """
import sys
from pathlib import Path
import cddlib
module = sys.modules["cddlib.data.download"]
module._BATCH, module._DURABLE, module._PARALLEL, module._usable_cpus = 8, 3, 0, lambda: 2
decode = module._decode
def pausing(files, size):
    for number, batch in enumerate(decode(files, size)):
        if number == int(sys.argv[3]):
            print("paused", flush=True)
            sys.stdin.read()
        yield batch
module._decode = pausing
cddlib.prepare("imagefolder", Path(sys.argv[1]), source=Path(sys.argv[2]), size=int(sys.argv[4]))
"""


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, folder: Path, decoded: list[str]) -> None:
    """SIGKILL between two batches, in the middle of what is not yet durable; its two worker processes end with it."""
    batches = random.randrange(4, 36)  # of 38
    command = [sys.executable, "-c", PAUSED, str(tmp_path), str(folder), str(batches), "64"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "paused\n"
        with pytest.raises(UserError, match=r"in use: other work holds \.imagefolder\.lock; wait"):
            make(folder, tmp_path, 64)
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)  # until nobody has its output open
    done = batches // 3 * 3 * 8
    assert noted(tmp_path) == done
    assert not (tmp_path / "imagefolder.safetensors").exists()
    found = make(folder, tmp_path, 64)
    assert len(decoded) == 300 - done
    assert found == reference(folder, tmp_path / "wanted", 64)
    assert not list(tmp_path.glob("imagefolder.p*"))


def test_a_mended_image_lets_the_run_go_on(
    tmp_path: Path, folder: Path, broken: tuple[Path, bytes], decoded: list[str]
) -> None:
    file, good = broken
    for _ in range(2):  # the second time it goes on, to fail at the same image
        with pytest.raises(UserError) as caught:
            make(folder, tmp_path)
        assert str(caught.value).startswith(f"{file} is not a readable image (")
        assert noted(tmp_path) == 240  # 60 for testing, two classes of 80, and 20 before it in the third
    assert len(decoded) == 248 + 8
    decoded.clear()
    file.write_bytes(good)
    assert make(folder, tmp_path) == reference(folder, tmp_path / "wanted")
    assert len(decoded) == 60


def another_size(folder: Path, root: Path) -> tuple[Path, int]:
    return folder, SIZE + 1


def moved(folder: Path, root: Path) -> tuple[Path, int]:
    return folder.rename(folder.with_name("moved")), SIZE


def another_image(folder: Path, root: Path) -> tuple[Path, int]:
    (folder / "train" / "a" / "003.png").rename(folder / "train" / "a" / "zzz.png")
    return folder, SIZE


def another_class(folder: Path, root: Path) -> tuple[Path, int]:
    for part in ("train", "val"):
        (folder / part / "a").rename(folder / part / "aa")
    return folder, SIZE


def shorter(folder: Path, root: Path) -> tuple[Path, int]:
    os.truncate(root / "imagefolder.partial", 1000)
    return folder, SIZE


@pytest.mark.parametrize("change", [another_size, moved, another_image, another_class, shorter])
def test_another_source_starts_anew(
    tmp_path: Path, folder: Path, broken: tuple[Path, bytes], decoded: list[str], change
) -> None:
    with pytest.raises(UserError, match="is not a readable image"):
        make(folder, tmp_path)
    broken[0].write_bytes(broken[1])
    folder, size = change(folder, tmp_path)
    decoded.clear()
    found = make(folder, tmp_path, size)
    assert len(decoded) == 300
    assert found == reference(folder, tmp_path / "wanted", size)


def test_a_record_does_not_vouch_for_what_another_source_wrote_over(
    tmp_path: Path, folder: Path, broken: tuple[Path, bytes]
) -> None:
    with pytest.raises(UserError, match="is not a readable image"):
        make(folder, tmp_path)
    assert noted(tmp_path) > 0
    first = min((folder / "val" / "a").iterdir())
    good = first.read_bytes()
    first.write_bytes(b"")
    with pytest.raises(UserError, match=str(first)):
        make(folder, tmp_path, SIZE + 1)
    assert noted(tmp_path) == 0
    first.write_bytes(good)
    broken[0].write_bytes(broken[1])
    assert make(folder, tmp_path) == reference(folder, tmp_path / "wanted")


@pytest.mark.parametrize("place", [-1, 8 + 30 * SIZE**2, 240 * 3 * SIZE**2 // 2])
def test_damage_to_the_images_so_far_is_noticed(
    tmp_path: Path, folder: Path, broken: tuple[Path, bytes], decoded: list[str], place: int
) -> None:
    with pytest.raises(UserError, match="is not a readable image"):
        make(folder, tmp_path)
    broken[0].write_bytes(broken[1])
    partial = tmp_path / "imagefolder.partial"
    content = bytearray(partial.read_bytes())
    images = len(content) - 240 * 3 * SIZE**2  # where they begin
    content[images + place if place >= 0 else place] ^= 1
    partial.write_bytes(content)
    decoded.clear()
    with pytest.raises(UserError) as refused:
        make(folder, tmp_path)
    assert str(refused.value) == (
        f"{partial} is damaged: its first 240 images are not those that were read; delete it and run the same command "
        f"again."
    )
    assert not decoded
    assert partial.read_bytes() == content
    partial.unlink()
    assert make(folder, tmp_path) == reference(folder, tmp_path / "wanted")


def test_a_damaged_record_of_progress_is_named(tmp_path: Path, folder: Path, broken: tuple[Path, bytes]) -> None:
    with pytest.raises(UserError, match="is not a readable image"):
        make(folder, tmp_path)
    record = tmp_path / "imagefolder.progress.json"
    record.write_bytes(record.read_bytes().replace(b"240", b"248"))
    with pytest.raises(
        UserError, match=r"imagefolder\.progress\.json is damaged: its contents do not have the checksum"
    ):
        make(folder, tmp_path)


WATCHED = """
import sys, threading
from pathlib import Path
import cddlib
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))
peak, stop = [], threading.Event()
def watch():
    while not stop.wait(0.005):
        peak.append(anonymous())
cddlib.prepare("imagefolder", Path(sys.argv[1]) / "warm", source=Path(sys.argv[3]), size=256)
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
cddlib.prepare("imagefolder", Path(sys.argv[1]), source=Path(sys.argv[2]), size=256)
stop.set()
thread.join()
print(max(peak) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, imagenet: Path) -> None:
    """A thousand images are 187 MB; a batch of 64, decoded and stacked, is 24 MB."""
    many = tmp_path / "many"
    for name in ("n01", "n02"):
        (many / "val" / name).mkdir(parents=True)
        (many / "train" / name).mkdir(parents=True)
        source = next((imagenet / "val" / name).iterdir())
        (many / "val" / name / source.name).hardlink_to(source)
        for i in range(500):
            (many / "train" / name / f"{i}.png").hardlink_to(source)
    command = [sys.executable, "-c", WATCHED, str(tmp_path), str(many), str(imagenet)]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (tmp_path / "imagefolder.safetensors").stat().st_size > 187 * 2**20
    assert grown < 60


def test_the_committed_record_shows_memory_that_does_not_grow() -> None:
    record = read_record(Path(__file__).resolve().parents[2] / "book" / "results" / "streaming.json")
    streamed, mapped = record["streamed"], record["mapped"]
    few, whole = (streamed[run]["peak_anonymous"]["process_mb"] for run in ("few", "whole"))
    assert whole - few < 0.2 * streamed["file_mb"]
    grown = mapped["fingerprint"]["anonymous_mb"] - mapped["before"]["anonymous_mb"]
    assert grown < 0.05 * mapped["images"] * 3 * 64**2 / 1e6
    assert streamed["resumed"]["same_bytes"]


# --- Preparing with torchvision ---------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    """Fashion-MNIST's format: a magic number, the sizes, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Small archives of Fashion-MNIST where torchvision looks for them, taken for the right ones."""
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda file, *_: Path(file).exists())
    arrays = random_arrays(1, (1, 28, 28))
    raw = tmp_path / "downloads" / "FashionMNIST" / "raw"
    for part, file in (("train", "train"), ("test", "t10k")):
        write_idx(raw / f"{file}-images-idx3-ubyte", arrays[f"{part}_images"][:, 0])
        write_idx(raw / f"{file}-labels-idx1-ubyte", arrays[f"{part}_labels"].astype(np.uint8))
    for file in list(raw.iterdir()):
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    return arrays


@pytest.mark.parametrize("unpacked", [False, True])
def test_fashion_mnist_from_torchvisions_archives(
    tmp_path: Path, fashion: dict[str, np.ndarray], unpacked: bool
) -> None:
    """What lies unpacked beside them, which no checksum vouches for, is replaced."""
    if unpacked:
        raw = tmp_path / "downloads" / "FashionMNIST" / "raw"
        for file in list(raw.iterdir()):
            file.with_suffix("").write_bytes(b"half")
    prepare("fashion_mnist", tmp_path)
    found = load("fashion_mnist", tmp_path)
    assert np.array_equal(found.train.images, fashion["train_images"])
    assert np.array_equal(found.test.labels, fashion["test_labels"])
    assert len(found.classes) == 10
    assert found.classes[9] == "Ankle boot"
    assert found.fingerprint == found.recorded


def write_cifar(folder: Path, arrays: dict[str, np.ndarray], name: str) -> list[str]:
    """The original pickles; returns the class names."""
    classes = [f"class {i}" for i in range(10 if name == "cifar10" else 100)]
    if name == "cifar10":
        folder, label, meta, label_names = folder / "cifar-10-batches-py", "labels", "batches.meta", "label_names"
        files = {f"data_batch_{i + 1}": ("train", slice(6 * i, 6 * i + 6)) for i in range(5)}
        files["test_batch"] = ("test", slice(None))
    else:
        folder, label, meta, label_names = folder / "cifar-100-python", "fine_labels", "meta", "fine_label_names"
        files = {"train": ("train", slice(None)), "test": ("test", slice(None))}
    folder.mkdir(parents=True)
    (folder / meta).write_bytes(pickle.dumps({label_names: classes}))
    for file, (part, rows) in files.items():
        images, labels = arrays[f"{part}_images"][rows], arrays[f"{part}_labels"][rows]
        content = {"data": images.reshape(len(images), -1), label: labels.tolist()}
        (folder / file).write_bytes(pickle.dumps(content))
    return classes


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_the_original_batches(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    arrays = random_arrays(2, (3, 32, 32))
    classes = write_cifar(tmp_path / "downloads", arrays, name)
    prepare(name, tmp_path)
    found = load(name, tmp_path)
    assert found.classes == tuple(classes)
    for part, images in (("train", found.train), ("test", found.test)):
        assert np.array_equal(images.images, arrays[f"{part}_images"])
        assert np.array_equal(images.labels, arrays[f"{part}_labels"])


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100"])
def test_a_failing_download_gives_one_sentence(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args, **_kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(UserError) as caught:
        prepare(name, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{name} cannot be downloaded to {tmp_path / 'downloads'} (")
    assert "no network" in message
    assert "\n" not in message
    assert not (tmp_path / f"{name}.safetensors").exists()

"""Preparing data sets: downloaded, or streamed from a folder of images into one tensor file.

On the command line::

    cddlib data cifar10 --root DIR                            # downloads, once
    cddlib data tiny_imagenet --source tiny-imagenet-200      # from a folder you have
    cddlib data imagenet --source ILSVRC2012                  # likewise: 1.3 million images, 16 GB

The images of a folder are decoded in parallel and appended to an unfinished file, so that memory holds a batch at most,
whatever their number. A record beside it says how many of them are on the disk, with their digest: asked again for the
same images, an interrupted run goes on from there and ends with the same bytes. At the end the data set is written from
the unfinished file, which is then deleted: until then the disk holds the images twice.

A folder's images may be anyone's, see `cddlib.data.pictures`. CIFAR's archives hold pickles; torchvision unpacks
archives and unpickles files only if they have the checksums that it knows.
"""

import contextlib
import hashlib
import mmap
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BufferedRandom
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL.Image import DecompressionBombWarning
from torch import Tensor

from cddlib.data.dataset import Images, check_data_name, default_root, fingerprint, load, map_images
from cddlib.data.pictures import read_picture
from cddlib.runtime.distributed import Interrupted, Ranks
from cddlib.runtime.errors import UserError, out_of_memory_hint, require
from cddlib.runtime.files import read_json, write_json, write_tensors, writing
from cddlib.runtime.run_folder import at_work, locked

_DOWNLOADS = {"fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
"""Classes of `torchvision.datasets`."""
_SIZE = 64
_THREAD = 2**28
"""Bytes of addresses that have to be free for each thread when it starts: its stack, and what malloc sets aside."""
_BATCH = 512
"""Images that wait for a thread or for the disk at most; after as many, those so far are recorded."""

Samples = list[tuple[str, int]]
"""Image files and their classes."""


@out_of_memory_hint("--size")
def prepare(name: str, root: Path | None = None, *, source: Path | None = None, size: int = _SIZE) -> Path:
    """Write `<root>/<name>.safetensors` and return its path; a file already there is checked and kept.

    Args:
        name: fashion_mnist, cifar10, cifar100: downloaded by torchvision. tiny_imagenet, imagenet, imagefolder: from
            `source`.
        root: folder of the cache.
        source: a folder in Tiny ImageNet's original layout, or with `train/<class>/*` and `val/<class>/*`.
        size: pixels of a side, for imagefolder; the other data sets have one size. The shorter side is resized to it
            with antialiasing, then the middle is cut out.

    Raises:
        UserError: a download fails, a folder has another layout, or an image cannot be read. Images read before it
            are kept: once it is mended, the same call goes on. Or a file already there is damaged, or another process
            is writing it.
        Interrupted: a signal asked to stop; the images read before it are kept.
    """
    check_data_name(name)
    root = root or default_root()
    path = root / f"{name}.safetensors"
    if name == "digits":
        raise UserError("digits comes with scikit-learn; nothing needs to be prepared.")
    require(1, size=size)
    if size != _SIZE and name != "imagefolder":
        raise UserError(f"size is {size}, but {name} has a size of its own; only imagefolder takes one.")
    lock = root / f".{name}.lock"
    if path.exists():
        kept = load(name, root)
        _ = kept.fingerprint  # which refuses a damaged file
        if name == "imagefolder" and kept.shape[1] != size:
            raise UserError(f"{path} has images of {kept.shape[1]} pixels, not of {size}; delete it first.")
    elif name in _DOWNLOADS:
        with locked(lock):
            _download(path, name)
    else:
        test, train, classes = _listing(name, source)
        with at_work(lock, "the image") as ranks:
            images = _decoded(path, [file for file, _ in test + train], size, ranks)
            parts = zip(images.split([len(test), len(train)]), (test, train), strict=True)
            found = [Images(part, torch.tensor([label for _, label in samples])) for part, samples in parts]
            _write(path, train=found[1], test=found[0], classes=classes)
    with contextlib.suppress(OSError):  # a folder where nobody may write
        for unfinished in _unfinished(path):
            unfinished.unlink(missing_ok=True)
    return path


def _unfinished(path: Path) -> tuple[Path, Path]:
    """The images that are decoded so far, and the record of how many of them are on the disk."""
    return path.with_suffix(".partial"), path.with_suffix(".progress.json")


def _write(path: Path, *, train: Images, test: Images, classes: list[str]) -> None:
    """Write a data set; its images may be mapped files."""
    tensors = {"train_images": train.store, "train_labels": train.labels}
    tensors |= {"test_images": test.store, "test_labels": test.labels}
    header = {"classes": classes, "fingerprint": fingerprint(train, test)}
    write_tensors(path, tensors, "dataset", header, digests=False)


def _download(path: Path, name: str) -> None:
    """Write a data set that torchvision fetches, which checks the downloads against its checksums."""
    import torchvision.datasets

    folder = path.parent / "downloads"
    fetch = getattr(torchvision.datasets, _DOWNLOADS[name])
    for file in (folder / "FashionMNIST").glob("*/*"):
        if file.suffix != ".gz":  # unpacked, and torchvision would take it without a checksum
            file.unlink()
    parts: dict[str, Images] = {}
    for part in ("train", "test"):
        try:
            fetched = fetch(folder, train=part == "train", download=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())  # torchvision's has several lines
            raise UserError(f"{name} cannot be downloaded to {folder} ({reason}).") from None
        images = torch.as_tensor(fetched.data)
        # torchvision keeps CIFAR as n x h x w x c and Fashion-MNIST as n x h x w
        images = images.permute(0, 3, 1, 2) if images.ndim == 4 else images.unsqueeze(1)
        parts[part] = Images(images, torch.as_tensor(fetched.targets).long())
    _write(path, **parts, classes=list(fetched.classes))


# --- What is in a folder ----------------------------------------------------------------------------------------


def _listing(name: str, source: Path | None) -> tuple[Samples, Samples, list[str]]:
    """The test images of a folder, its training images, and the names of the classes."""
    if source is None or not (source / "train").is_dir() or not (source / "val").is_dir():
        raise UserError(f"{name} needs --source, a folder that holds train/ and val/; got {source}.")
    from torchvision.datasets import ImageFolder

    source = source.absolute()
    folder = source / "train"
    try:
        train = ImageFolder(str(folder))
        if name == "tiny_imagenet":
            return _annotated(source / "val" / "val_annotations.txt", train.class_to_idx), train.samples, train.classes
        folder = source / "val"
        val = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise UserError(f"{folder} must hold a folder of images for each class, {folder}/CLASS/* ({error}).") from None
    if val.classes != train.classes:
        odd = sorted(set(val.classes) ^ set(train.classes))
        raise UserError(f"train/ and val/ in {source} do not have the same classes; they differ in {odd[:5]}.")
    return val.samples, train.samples, train.classes


def _annotated(annotations: Path, class_to_idx: dict[str, int]) -> Samples:
    """Tiny ImageNet's validation images: file name and class, tab-separated, a line each."""
    if not annotations.exists():
        source = annotations.parent.parent
        raise UserError(f"{annotations} does not exist: {source} is not in Tiny ImageNet's original layout.")
    rows = [line.split("\t") for line in annotations.read_text("utf-8", "surrogateescape").splitlines()]
    named = [(row[0], class_to_idx[row[1]]) for row in rows if len(row) > 1 and row[1] in class_to_idx]
    outside = next((file for file, _ in named if Path(file).name != file or file in ("", "..")), None)
    if outside is not None:
        raise UserError(f"{annotations} names {outside!r}, which is not a file beside the others.")
    if not named:
        raise UserError(f"{annotations} names no image of the classes in train/.")
    return [(str(annotations.parent / "images" / file), label) for file, label in named]


# --- From a folder into the file --------------------------------------------------------------------------------


def _decoded(path: Path, files: list[str], size: int, ranks: Ranks) -> UInt8[Tensor, "n c h w"]:
    """All images, mapped from the unfinished file, after those were decoded that an earlier call did not."""
    partial, record = _unfinished(path)
    source = hashlib.sha256(b"\0".join([str(size).encode(), *map(os.fsencode, files)])).hexdigest()
    with writing(partial), open(partial, "a+b") as file:
        digest, done = _resume(file, record, source, 3 * size**2)

        def sync() -> None:
            """Have the images on the disk, then record how many they are."""
            file.flush()
            os.fsync(file.fileno())
            write_json(record, {"source": source, "images": done, "sha256": digest.hexdigest()})

        with ranks.progress(desc=f"reading {path.stem}", initial=done, total=len(files), unit="image") as bar:
            try:
                for image in _read(files[done:], size):
                    file.write(image)
                    done += 1  # and Python heeds no signal before the digest has it, too
                    digest.update(image)
                    bar.update()
                    if done % _BATCH == 0:
                        sync()
                    if ranks.asked and done < len(files):
                        raise Interrupted(f"stopped after image {done} of {len(files)}, which is saved", ranks.asked)
            finally:
                sync()
    return map_images(partial, 0, (len(files), 3, size, size))


def _read(files: list[str], size: int) -> Iterator[bytes]:
    """The pixels of image files in order, decoded by as many threads as PyTorch has."""
    count = torch.get_num_threads()
    # Python waits forever for a thread that finds no memory while it starts; read-only pages take addresses alone
    with mmap.mmap(-1, count * _THREAD, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ):
        ready = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool, warnings.catch_warnings():
        try:
            all(pool.map(lambda _: ready.wait() >= 0, range(count)))  # now, before images take memory
        except RuntimeError:  # there cannot be so many
            ready.abort()
            raise
        warnings.simplefilter("ignore", DecompressionBombWarning)  # `read_picture` refuses smaller ones
        for start in range(0, len(files), _BATCH):
            yield from pool.map(lambda file: read_picture(file, size), files[start : start + _BATCH])


def _resume(file: BufferedRandom, record: Path, source: str, image_bytes: int) -> tuple[Any, int]:
    """The digest of the images in the file that an earlier call for this `source` recorded, and how many they are.

    Raises:
        UserError: the images there are not those that were recorded.
    """
    earlier = read_json(record) if record.exists() else {}
    done = earlier["images"] if earlier.get("source") == source else 0
    if done * image_bytes > os.fstat(file.fileno()).st_size:  # it is gone, or cut off
        done = 0
    if done == 0:
        record.unlink(missing_ok=True)  # first, lest it vouch for what follows
    file.truncate(done * image_bytes)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")
    if done and digest.hexdigest() != earlier.get("sha256"):
        raise UserError(
            f"{file.name} is damaged: its first {done} images are not those that were read; delete it and run the same "
            f"command again."
        )
    return digest, done

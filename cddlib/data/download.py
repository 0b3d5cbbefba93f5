"""Preparing data sets: downloaded, or streamed from a folder of images into one tensor file.

On the command line::

    cddlib data cifar10 --root DIR                            # downloads, once
    cddlib data tiny_imagenet --source tiny-imagenet-200      # from a folder you have
    cddlib data imagenet --source ILSVRC2012                  # likewise: 1.3 million images, 16 GB

The images of a folder are decoded in parallel and written straight to their places in the file, so that memory holds
a few batches whatever their number. Beside the unfinished file lies a record of how many images are on the disk, with
their digest: asked again for the same images, an interrupted run goes on from there and ends with the same bytes.

A folder's images may be anyone's, see `cddlib.data.pictures`. CIFAR's archives hold pickles; torchvision unpacks
archives and unpickles files only if they have the checksums that it knows.
"""

import contextlib
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cddlib.data.dataset import Images, check_data_name, default_root, fingerprint, load, map_images
from cddlib.data.pictures import Pictures
from cddlib.runtime.device import end_with_parent
from cddlib.runtime.distributed import Interrupted, Ranks
from cddlib.runtime.errors import UserError, out_of_memory_hint
from cddlib.runtime.files import add_checksum, read_json, write_json, write_tensors, writing
from cddlib.runtime.run_folder import locked

_DOWNLOADS = {"fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
"""Classes of `torchvision.datasets`."""
_SIZE = 64
_BATCH = 64
"""Images that a worker process decodes at a time."""
_DURABLE = 16
"""Batches after which the images so far are flushed to disk and recorded."""
_PARALLEL = 1024
"""Images from which on it pays to start worker processes."""

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
    if size < 1:
        raise UserError(f"size is {size}; it must be at least 1.")
    if size != _SIZE and name != "imagefolder":
        raise UserError(f"size is {size}, but {name} has a size of its own; only imagefolder takes one.")
    if path.exists():
        _ = load(name, root).fingerprint  # which refuses a damaged file
    else:
        listing = None if name in _DOWNLOADS else _listing(name, source)
        with locked(root / f".{name}.lock"), writing(path):
            if listing is None:
                _download(path, name)
            else:
                _stream(path, *listing, size)
    with contextlib.suppress(OSError):  # there is one only if a process was killed just here
        _record_of(path).unlink()
    return path


def _record_of(path: Path) -> Path:
    """The file that says how much of the unfinished file is on the disk."""
    return path.with_suffix(".progress.json")


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
    tensors = {f"{part}_images": images.store for part, images in parts.items()}
    tensors |= {f"{part}_labels": images.labels for part, images in parts.items()}
    header = {"classes": list(fetched.classes), "fingerprint": fingerprint(*parts.values())}
    write_tensors(path, tensors, "dataset", header, digests=False)


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


def _stream(path: Path, test: Samples, train: Samples, classes: list[str], size: int) -> None:
    """Write the file image by image, or go on where an earlier call for the same images stopped."""
    files = [file for file, _ in test + train]
    partial = path.with_suffix(".partial")
    partial.touch()
    ranks = Ranks()  # one process, which heeds signals
    with ranks.graceful_stop("the batch"), open(partial, "r+b") as file:
        unfinished = _Unfinished(file, _record_of(path), _head(test, train, classes, size), files, 3 * size**2)
        try:
            with tqdm(desc=f"reading {path.stem}", initial=unfinished.done, total=len(files), unit="image") as progress:
                for number, batch in enumerate(_decode(files[unfinished.done :], size), start=1):
                    for image in batch:
                        if isinstance(image, UserError):
                            raise image
                        unfinished.append(image)
                    progress.update(len(batch))
                    if number % _DURABLE == 0:
                        unfinished.sync()
                    if ranks.asked and unfinished.done < len(files):
                        done = f"image {unfinished.done} of {len(files)}"
                        raise Interrupted(f"stopped after {done}, which is saved", ranks.asked)
        except RuntimeError as error:  # torch's, wherever this process was
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                f"a process that decodes images was killed, perhaps for want of memory ({str(error).rstrip('. ')}); "
                f"the same command goes on from image {unfinished.done}: on fewer processors (taskset) in less memory."
            ) from None
        finally:
            unfinished.sync()
        written = map_images(partial, unfinished.start, (len(files), 3, size, size))
        parts = [
            Images(images, torch.tensor([label for _, label in samples]))
            for images, samples in zip(written.split([len(test), len(train)]), (test, train), strict=True)
        ]
        file.seek(0)
        file.write(_head(test, train, classes, size, fingerprint(parts[1], parts[0])))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


class _Unfinished:
    """The file that images are appended to, and a record of how many of them are on the disk.

    Attributes:
        start: the byte at which the images begin.
        done: how many images the file has.
    """

    def __init__(self, file: BinaryIO, record: Path, head: bytes, files: list[str], image_bytes: int) -> None:
        """Go behind the images that an earlier call for the same `files` recorded, or begin anew.

        Raises:
            UserError: the images there are not those that were recorded.
        """
        self.file, self.record, self.start = file, record, len(head)
        self.source = hashlib.sha256(b"\0".join([head, *map(os.fsencode, files)])).hexdigest()
        self.done, self.digest = 0, hashlib.sha256()
        earlier = read_json(record) if record.exists() else {}
        images = earlier["images"] if earlier.get("source") == self.source else 0
        if images == 0 or os.fstat(file.fileno()).st_size < self.start + images * image_bytes:  # gone, or cut off
            self.sync()  # first, lest an older record vouch for what follows
            file.truncate(0)
            file.write(head)
            return
        file.seek(self.start)
        for _ in range(images):
            self.digest.update(file.read(image_bytes))
        self.done = images
        if self.digest.hexdigest() != earlier.get("sha256"):
            raise UserError(
                f"{file.name} is damaged: its first {images} images are not those that were read; delete it and run "
                f"the same command again."
            )

    def append(self, image: bytes) -> None:
        """Write an image, from whose end on the next call goes on."""
        self.file.write(image)
        self.digest.update(image)
        self.done += 1

    def sync(self) -> None:
        """Have the images on the disk, then record how many they are."""
        self.file.flush()
        os.fsync(self.file.fileno())
        write_json(self.record, {"source": self.source, "images": self.done, "sha256": self.digest.hexdigest()})


def _head(test: Samples, train: Samples, classes: list[str], size: int, fingerprint: str = "0" * 16) -> bytes:
    """All but the images: the beginning of the file that `cddlib.runtime.files.write_tensors` would write.

    The images follow, those for testing first: labels come before them because their numbers are wider.
    """
    labels = [np.array([label for _, label in samples], dtype="<i8") for samples in (test, train)]
    header: dict[str, Any] = {
        "__metadata__": {"dataset": json.dumps(add_checksum({"classes": classes, "fingerprint": fingerprint}))}
    }
    end = 0
    for kind, dtype, width, shape in (("labels", "I64", 8, []), ("images", "U8", 3 * size**2, [3, size, size])):
        for part, n in (("test", len(test)), ("train", len(train))):
            begin, end = end, end + n * width
            header[f"{part}_{kind}"] = {"dtype": dtype, "shape": [n, *shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(part.tobytes() for part in labels)])


def _decode(files: list[str], size: int) -> DataLoader:
    """Batches of images in order, decoded by as many processes as there are processors if it pays to start them."""
    decoder = Pictures(files, size)
    workers = 0 if len(files) < _PARALLEL else _usable_cpus()
    return DataLoader(decoder, batch_size=_BATCH, collate_fn=list, num_workers=workers, worker_init_fn=_begin_worker)


def _begin_worker(_number: int) -> None:
    """What a worker process does first: a terminal sends it the signal too that the one which started it heeds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _usable_cpus() -> int:
    """Processors that this process may use, where the system tells; else all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Preparing data sets: downloaded, or streamed from a folder of images into one tensor file.

On the command line::

    cddlib data cifar10 --root DIR                            # downloads, once
    cddlib data tiny_imagenet --source tiny-imagenet-200      # from a folder you have
    cddlib data imagenet --source ILSVRC2012                  # likewise: 1.3 million images, 16 GB

The images of a folder are decoded in parallel and written straight to their places in the file, so that memory holds
a few batches whatever their number. Beside the unfinished file lies a record of how many images are durable: asked
again for the same images, an interrupted run goes on from there and ends with the same bytes.

A folder's images may be anyone's: BMP, JPEG, PNG, PPM and WebP are read, and none that would need more than its share
of memory or time. CIFAR's archives hold pickles; torchvision unpacks archives and unpickles files only if they have the
checksums that it knows.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cddlib.data.dataset import Images, check_data_name, default_root, fingerprint, load, map_images
from cddlib.runtime.device import end_with_parent
from cddlib.runtime.distributed import Interrupted, Ranks
from cddlib.runtime.errors import UserError, is_out_of_memory, out_of_memory_hint
from cddlib.runtime.files import add_checksum, read_json, write_json, write_tensors, writing
from cddlib.runtime.run_folder import locked

_DOWNLOADS = {"fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
"""Classes of `torchvision.datasets`."""
MOST_PIXELS = 2**26
"""Pixels of the largest image that is decoded, before or after it is resized; ImageNet's largest has 61 million.

A worker process needs up to 8 bytes for each."""
LARGEST_IMAGE = 2**28
"""Bytes of the longest image file that is read."""
MOST_SCANS = 512
"""Most passes of a JPEG over its image. There are about ten; 30 bytes can ask for one more."""
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "WEBP")  # Pillow knows more, of which EPS runs a program
_SIZE = 64
_BATCH = 64
"""Images that a worker process decodes at a time."""
_DURABLE = 16
"""Batches after which the images so far are flushed to disk and noted down."""
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
        with locked(root / f".{name}.lock"):
            _write(path, name, listing, size)
    with contextlib.suppress(OSError):  # there is none, unless a process was killed just here
        _record_of(path).unlink()
    return path


def _record_of(path: Path) -> Path:
    """Where it is noted how much of the unfinished file is durable."""
    return path.with_suffix(".progress.json")


def _write(path: Path, name: str, listing: tuple[Samples, Samples, list[str]] | None, size: int) -> None:
    """Write the file of a data set, downloaded or of the images that are listed."""
    if listing is None:
        tensors, classes = _download(name, path.parent / "downloads")
        parts = [Images(tensors[f"{part}_images"], tensors[f"{part}_labels"]) for part in ("train", "test")]
        header = {"classes": classes, "fingerprint": fingerprint(*parts)}
        write_tensors(path, tensors, "dataset", header, digests=False)
    else:
        with writing(path):
            _stream(path, *listing, size)


def _download(name: str, folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Fetch a data set with torchvision, which checks the downloads against its checksums."""
    import torchvision.datasets

    fetch = getattr(torchvision.datasets, _DOWNLOADS[name])
    tensors = {}
    for file in (folder / "FashionMNIST").glob("*/*"):
        if file.suffix != ".gz":  # unpacked, and torchvision would take it without a checksum
            file.unlink()
    for part in ("train", "test"):
        try:
            found = fetch(folder, train=part == "train", download=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())  # torchvision's has several lines
            raise UserError(f"{name} cannot be downloaded to {folder} ({reason}).") from None
        images = torch.as_tensor(found.data)
        # torchvision keeps CIFAR as n x h x w x c and Fashion-MNIST as n x h x w
        tensors[f"{part}_images"] = images.permute(0, 3, 1, 2) if images.ndim == 4 else images.unsqueeze(1)
        tensors[f"{part}_labels"] = torch.as_tensor(found.targets).long()
    return tensors, list(found.classes)


# --- What is in a folder ----------------------------------------------------------------------------------------


def _listing(name: str, source: Path | None) -> tuple[Samples, Samples, list[str]]:
    """The test images of a folder, its training images, and the names of the classes."""
    if source is None or not (source / "train").is_dir() or not (source / "val").is_dir():
        raise UserError(f"{name} needs --source, a folder that holds train/ and val/; got {source}.")
    source = source.absolute()
    train = _image_folder(source / "train")
    if name == "tiny_imagenet":
        return _annotated(source / "val" / "val_annotations.txt", train.class_to_idx), train.samples, train.classes
    val = _image_folder(source / "val")
    if val.classes != train.classes:
        odd = sorted(set(val.classes) ^ set(train.classes))
        raise UserError(f"train/ and val/ in {source} do not have the same classes; they differ in {odd[:5]}.")
    return val.samples, train.samples, train.classes


def _image_folder(folder: Path) -> Any:
    """Torchvision's `ImageFolder`."""
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise UserError(f"{folder} must hold a folder of images for each class, {folder}/CLASS/* ({error}).") from None


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
    found = [(str(annotations.parent / "images" / file), label) for file, label in named]
    if not found:
        raise UserError(f"{annotations} names no image of the classes in train/.")
    return found


# --- From a folder into the file --------------------------------------------------------------------------------


def _stream(path: Path, test: Samples, train: Samples, classes: list[str], size: int) -> None:
    """Write the file image by image, or go on where an earlier call for the same images stopped."""
    head = _head(test, train, classes, size)
    files = [file for file, _ in test + train]
    source = hashlib.sha256(b"\0".join([head, *map(os.fsencode, files)])).hexdigest()
    partial, record = path.with_suffix(".partial"), _record_of(path)
    partial.touch()
    ranks = Ranks()  # one, whose signals are heeded
    with ranks.graceful_stop("the batch"), open(partial, "r+b") as file:
        found = read_json(record) if record.exists() else {}
        done = found.get("images") if found.get("source") == source else 0
        if type(done) is not int or not 0 <= done <= len(files):
            raise UserError(f"{record} is not a record of {len(files)} images ({done!r}); delete it and start again.")
        if partial.stat().st_size < len(head) + done * 3 * size**2:
            done = 0  # it is gone, or cut off
        chain = _chain(file, len(head), done, 3 * size**2)
        if done and chain != found.get("chain"):
            raise UserError(
                f"{partial} is damaged: its first {done} images are not those that were read; delete it and run the "
                f"same command again."
            )
        if done == 0:
            _note(record, source, 0, chain, file)  # first, lest an older record vouch for what follows
            file.truncate(0)
            file.seek(0)
            file.write(head)
        try:
            with tqdm(desc=f"reading {path.stem}", initial=done, total=len(files), unit="image") as progress:
                for number, batch in enumerate(_decode(files[done:], size), start=1):
                    if isinstance(batch, UserError):
                        raise batch
                    file.write(batch)
                    done, chain = done + len(batch), functools.reduce(_link, (image.data for image in batch), chain)
                    progress.update(len(batch))
                    if number % _DURABLE == 0:
                        _note(record, source, done, chain, file)
                    if ranks.asked and done < len(files):
                        stopped = f"stopped after image {done} of {len(files)}, which is saved"
                        raise Interrupted(stopped, ranks.asked)
        except RuntimeError as error:  # torch's, wherever this process was
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                f"a process that decodes images was killed, perhaps for want of memory ({str(error).rstrip('. ')}); "
                f"{done} images are kept, and the same command goes on: on fewer processors (taskset) in less memory."
            ) from None
        finally:
            _note(record, source, done, chain, file)
        written = map_images(partial, len(head), (len(files), 3, size, size))
        parts = [
            Images(images, torch.tensor([label for _, label in samples]))
            for images, samples in zip(written.split([len(test), len(train)]), (test, train), strict=True)
        ]
        file.seek(0)
        file.write(_head(test, train, classes, size, fingerprint(parts[1], parts[0])))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


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


def _chain(file: BinaryIO, start: int, images: int, size: int) -> str:
    """The chain of digests over the first `images` images of `size` bytes; leaves `file` behind them."""
    file.seek(start)
    return functools.reduce(_link, (file.read(size) for _ in range(images)), "")


def _link(chain: str, image: bytes | memoryview) -> str:
    """The next link of a chain of digests, each of the link before it and of the image that follows."""
    digest = hashlib.sha256(chain.encode())
    digest.update(image)
    return digest.hexdigest()


def _note(record: Path, source: str, done: int, chain: str, file: BinaryIO) -> None:
    """Write down how many images are durable, once they are."""
    file.flush()
    os.fsync(file.fileno())
    write_json(record, {"source": source, "images": done, "chain": chain})


def _decode(files: list[str], size: int) -> DataLoader:
    """Batches of images in order, decoded by as many processes as there are processors if it pays to start them."""
    decoder = _Decoder(files, size)
    workers = 0 if len(files) < _PARALLEL else _usable_cpus()
    return DataLoader(decoder, batch_size=_BATCH, collate_fn=_stack, num_workers=workers, worker_init_fn=_begin_worker)


def _begin_worker(_number: int) -> None:
    """What a worker process does first: a terminal sends it the signal too that the one which started it heeds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _usable_cpus() -> int:
    """Processors that this process may use, where the system tells; else all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Decoder(torch.utils.data.Dataset[Tensor | UserError]):
    """Image files as uint8 tensors of one size."""

    def __init__(self, files: list[str], size: int) -> None:
        from torchvision.transforms import v2

        # one array: a list's strings are counted as they are used, so that every worker would come to copy them all
        self.files = np.array([os.fsencode(file) for file in files], dtype=np.bytes_)
        self.size = size
        self.resize = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | UserError:
        """The image, or the error: what a worker process raises arrives with its traceback as the message."""
        file = os.fsdecode(self.files[index])
        try:
            return self.resize(_read_image(file, self.size))
        except Exception as error:  # what Pillow raises for a broken file depends on the format
            if is_out_of_memory(error):
                return UserError(f"there is not enough memory to read {file}; lower --size, or close other programs.")
            return UserError(f"{file} is not a readable image ({' '.join(str(error).split())}).")


def _read_image(file: str, size: int) -> Image.Image:
    """An image in RGB whose shorter side can be resized to `size`; raises `ValueError` if it asks too much."""
    if not os.path.isfile(file):
        raise ValueError("it is not a file")
    if os.path.getsize(file) > LARGEST_IMAGE:
        raise ValueError(f"it has {os.path.getsize(file)} bytes, more than {LARGEST_IMAGE}")
    content = Path(file).read_bytes()
    scans = content.count(b"\xff\xda") if content.startswith(b"\xff\xd8") else 1
    if scans > MOST_SCANS:
        raise ValueError(f"it has {scans} scans, more than {MOST_SCANS}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"it is none of {', '.join(_FORMATS)}") from None
    shorter, longer = sorted(image.size)
    pixels = max(shorter * longer, size**2 * longer // shorter)
    if pixels > MOST_PIXELS:
        raise ValueError(f"its sides of {shorter} and {longer} pixels make {pixels}, more than {MOST_PIXELS}")
    return image.convert("RGB")


def _stack(found: list[Tensor | UserError]) -> np.ndarray | UserError:
    """A batch, or its first error. An array goes through a pipe; a tensor would need shared memory."""
    error = next((item for item in found if isinstance(item, UserError)), None)
    return error or torch.stack(cast(list[Tensor], found)).numpy()

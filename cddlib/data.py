"""Data sets as tensors: uint8 images and labels, one safetensors file each, and the map to what a network sees.

Prepare a data set once::

    cddlib data cifar10 --root DIR                            # downloads, once
    cddlib data tiny_imagenet --source tiny-imagenet-200      # from a folder you have

`digits` (1,797 handwritten digits of 8x8 pixels, inside scikit-learn) needs no preparation.
"""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from safetensors import SafetensorError
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets as tv
from torchvision.transforms import v2
from tqdm.auto import tqdm

from cddlib.runs import UserError, check_classes, generator, open_tensors, read_metadata, write_tensors

DATA_NAMES = ("digits", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet", "imagefolder")
VALIDATION_FRACTION = 0.1
TENSORS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how a network sees them."""

    data: str = "digits"
    """One of digits, fashion_mnist, cifar10, cifar100, tiny_imagenet, imagefolder."""
    zca: bool = False
    """Whiten the pixels (ZCA, as MTT and DATM do) instead of normalising each channel."""

    def __post_init__(self) -> None:
        check_data_name(self.data)


def check_data_name(name: str) -> None:
    """Raise `UserError` for a name that is not in `DATA_NAMES`."""
    if name not in DATA_NAMES:
        raise UserError(f"unknown data set {name!r}; choose one of {', '.join(DATA_NAMES)}.")


class Images(NamedTuple):
    """Labelled images."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]

    def select(self, indices: Int64[Tensor, " m"]) -> "Images":
        """The images at `indices`."""
        return Images(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> "Images":
        """The same on `device`."""
        return Images(self.images.to(device), self.labels.to(device))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in memory: training and test images as uint8 tensors."""

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        c, h, w = self.train.images.shape[1:]
        return c, h, w

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the SHA-256 of all images and labels."""
        digest = hashlib.sha256()
        for tensor in (*self.train, *self.test):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @functools.cached_property
    def split(self) -> tuple[Images, Images]:
        """The training images in two parts: for training (nine tenths of every class) and for validation.

        Every selection uses the validation part; the test images are read once, at the end. The split is a fact of
        the data set, the same for every seed.
        """
        keep, held_out = stratified_split(self.train.labels, VALIDATION_FRACTION)
        return self.train.select(keep), self.train.select(held_out)


def stratified_split(labels: Int64[Tensor, " n"], fraction: float) -> tuple[Int64[Tensor, " a"], Int64[Tensor, " b"]]:
    """Two disjoint sets of indices that cover all: the second holds `fraction` of every class, at least one image."""
    rng = generator("split")
    keep, held_out = [], []
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        members = members[torch.randperm(len(members), generator=rng)]
        count = max(1, round(fraction * len(members)))
        held_out.append(members[:count])
        keep.append(members[count:])
    return torch.cat(keep).sort().values, torch.cat(held_out).sort().values


# --- Loading ----------------------------------------------------------------------------------------------------


def default_root() -> Path:
    """Where data sets lie unless told otherwise: `$CDDLIB_DATA`, else the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("CDDLIB_DATA", cache / "cddlib" / "data"))


def load(name: str, root: Path | None = None) -> Dataset:
    """The data set `name` from `<root>/<name>.safetensors`.

    Raises:
        UserError: unknown name, data not prepared yet (says what to run), or a file that is not what it should be.
    """
    check_data_name(name)
    if name == "digits":
        return _digits()
    path = (root or default_root()) / f"{name}.safetensors"
    if not path.exists():
        source = "" if name in _DOWNLOADS else " --source FOLDER"
        raise UserError(f"{name} is not in {path.parent}; run `cddlib data {name}{source} --root {path.parent}` first.")
    return _read(name, path)


def _read(name: str, path: Path) -> Dataset:
    """Read and check a cached data set."""
    file = open_tensors(path)
    missing = set(TENSORS) - set(file.keys())
    if missing:
        raise UserError(f"{path} lacks the tensors {', '.join(sorted(missing))}: it is not a cddlib data set.")
    classes = check_classes(read_metadata(file, path, "classes"), path)
    try:
        tensors = {key: file.get_tensor(key) for key in TENSORS}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}).") from None
    for part in ("train", "test"):
        images, labels = tensors[f"{part}_images"], tensors[f"{part}_labels"]
        wrong = (
            f"{part}_images is {images.dtype}{list(images.shape)}, not uint8[n, c, h, w]"
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != tensors["train_images"].shape[1:]
            else f"{part}_labels is {labels.dtype}{list(labels.shape)}, not int64[{len(images)}]"
            if labels.dtype != torch.int64 or labels.shape != (len(images),)
            else f"{part} has no images"
            if len(images) == 0
            else f"{part}_labels reach from {labels.min()} to {labels.max()}, with {len(classes)} classes named"
            if labels.min() < 0 or labels.max() >= len(classes)
            else None
        )
        if wrong:
            raise UserError(f"{path} is not a cddlib data set: {wrong}.")
    return _dataset(name, tensors, classes)


def _dataset(name: str, tensors: dict[str, Tensor], classes: tuple[str, ...]) -> Dataset:
    train = Images(tensors["train_images"], tensors["train_labels"])
    return Dataset(name, train, Images(tensors["test_images"], tensors["test_labels"]), classes)


@functools.cache
def _digits() -> Dataset:
    """Scikit-learn's digits, one fifth of every class for testing."""
    bunch = load_digits()
    images = torch.from_numpy((bunch.images * 255 / 16).round().astype(np.uint8)).unsqueeze(1)
    every = Images(images, torch.from_numpy(bunch.target).long())
    train, test = stratified_split(every.labels, 0.2)
    return Dataset("digits", every.select(train), every.select(test), tuple(str(name) for name in bunch.target_names))


# --- Preparing --------------------------------------------------------------------------------------------------

_DOWNLOADS = {"fashion_mnist": tv.FashionMNIST, "cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}


def prepare(name: str, root: Path | None = None, *, source: Path | None = None, size: int = 64) -> Path:
    """Write `<root>/<name>.safetensors` and return its path; a file already there is checked and kept.

    Args:
        name: fashion_mnist, cifar10, cifar100: downloaded by torchvision. tiny_imagenet, imagefolder: from `source`.
        root: folder of the cache.
        source: a folder in Tiny ImageNet's original layout, or with `train/<class>/*` and `val/<class>/*`.
        size: pixels of a side, for imagefolder: the shorter side is resized to it with antialiasing, then the
            middle is cut out.

    Raises:
        UserError: a download fails, a folder has another layout, or an image cannot be read.
    """
    check_data_name(name)
    root = root or default_root()
    path = root / f"{name}.safetensors"
    if name == "digits":
        raise UserError("digits comes with scikit-learn; nothing needs to be prepared.")
    if path.exists():
        _read(name, path)
        return path
    if name in _DOWNLOADS:
        tensors, classes = _download(name, root / "downloads")
    elif source is None or not (source / "train").is_dir() or not (source / "val").is_dir():
        raise UserError(f"{name} needs --source, a folder that holds train/ and val/; got {source}.")
    else:
        tensors, classes = _from_folder(name, source, size)
    write_tensors(path, tensors, {"classes": classes})
    return path


def _download(name: str, folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Fetch a data set with torchvision, which checks the downloads against its checksums."""
    tensors = {}
    for part in ("train", "test"):
        try:
            found = _DOWNLOADS[name](folder, train=part == "train", download=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())  # torchvision's has several lines
            raise UserError(f"{name} cannot be downloaded to {folder} ({reason}).") from None
        images = torch.as_tensor(found.data)
        # torchvision keeps CIFAR as n x h x w x c and Fashion-MNIST as n x h x w
        tensors[f"{part}_images"] = images.permute(0, 3, 1, 2) if images.ndim == 4 else images.unsqueeze(1)
        tensors[f"{part}_labels"] = torch.as_tensor(found.targets).long()
    return tensors, list(found.classes)


def _from_folder(name: str, source: Path, size: int) -> tuple[dict[str, Tensor], list[str]]:
    """Decode and resize the images of a folder in parallel."""
    train = _image_folder(source / "train")
    annotations = source / "val" / "val_annotations.txt"
    if name == "tiny_imagenet":
        size = 64
        if not annotations.exists():
            raise UserError(f"{annotations} does not exist: {source} is not in Tiny ImageNet's original layout.")
        val = _annotated(annotations, train.class_to_idx)
    else:
        found = _image_folder(source / "val")
        if found.classes != train.classes:
            odd = sorted(set(found.classes) ^ set(train.classes))
            raise UserError(f"train/ and val/ in {source} do not have the same classes; they differ in {odd[:5]}.")
        val = found.samples
    tensors = {}
    for part, samples in (("train", train.samples), ("test", val)):
        images = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
        loader = torch.utils.data.DataLoader(
            _Decoder([path for path, _ in samples], size),
            batch_size=64,
            collate_fn=_stack,
            num_workers=0 if len(samples) < 1024 else _usable_cpus(),
        )
        start = 0
        for batch in tqdm(loader, desc=f"reading {part}", unit="batch"):
            if isinstance(batch, UserError):
                raise batch
            images[start : start + len(batch)] = batch
            start += len(batch)
        tensors[f"{part}_images"] = images
        tensors[f"{part}_labels"] = torch.tensor([label for _, label in samples])
    return tensors, train.classes


def _usable_cpus() -> int:
    """Processors that this process may use, where the system tells; else all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _image_folder(folder: Path) -> tv.ImageFolder:
    try:
        return tv.ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a folder of images by class ({error}).") from None


def _annotated(annotations: Path, class_to_idx: dict[str, int]) -> list[tuple[str, int]]:
    """Tiny ImageNet's validation images: file name and class, tab-separated, a line each."""
    rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines()]
    found = [
        (str(annotations.parent / "images" / file), class_to_idx[wnid]) for file, wnid in rows if wnid in class_to_idx
    ]
    if not found:
        raise UserError(f"{annotations} names no image of the classes in train/.")
    return found


class _Decoder(torch.utils.data.Dataset[Tensor | UserError]):
    """Image files as uint8 tensors of one size."""

    def __init__(self, paths: list[str], size: int) -> None:
        self.paths = paths
        self.resize = v2.Compose(
            [v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.PILToTensor(), v2.ToDtype(torch.uint8)]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | UserError:
        """The image, or the error: what a worker process raises arrives with its traceback as the message."""
        try:
            return self.resize(tv.folder.pil_loader(self.paths[index]))
        except OSError as error:
            return UserError(f"{self.paths[index]} is not a readable image ({error}).")


def _stack(found: list[Tensor | UserError]) -> Tensor | UserError:
    return next((item for item in found if isinstance(item, UserError)), None) or torch.stack(cast(list[Tensor], found))

"""Data sets as tensors: uint8 images and their labels, one safetensors file each, which `cddlib data` prepares.

Images stay in the file, which is mapped into memory: the system reads what is used, and a set may be larger than
memory. `digits` (1,797 handwritten digits of 8x8 pixels, inside scikit-learn) needs no file.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from cddlib.runtime.errors import UserError, as_user_error, needing
from cddlib.runtime.files import check_classes, open_tensors, parse_json, read_header
from cddlib.runtime.random import generator

FROM_FOLDER = ("tiny_imagenet", "imagenet", "imagefolder")
DATA_NAMES = ("digits", "fashion_mnist", "cifar10", "cifar100", *FROM_FOLDER)
VALIDATION_FRACTION = 0.1
CHUNK = 4096
"""Images that are read at a time where all of them are needed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how a network sees them."""

    data: str = "digits"
    """One of digits, fashion_mnist, cifar10, cifar100, tiny_imagenet, imagenet, imagefolder."""
    zca: bool = False
    """Whiten the pixels (ZCA, as MTT and DATM do) instead of normalising each channel."""

    def __post_init__(self) -> None:
        check_data_name(self.data)


def check_data_name(name: str) -> None:
    """Raise `UserError` for a name that is not in `DATA_NAMES`."""
    if name not in DATA_NAMES:
        raise UserError(f"unknown data set {name!r}; choose one of {', '.join(DATA_NAMES)}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Labelled images: rows of a tensor that may be a mapped file. Selecting among them copies no image."""

    store: UInt8[Tensor, "stored c h w"]
    """The images these are taken from, in memory or mapped from a file, which nobody writes to."""
    labels: Int64[Tensor, " n"]
    """The classes."""
    rows: Int64[Tensor, " n"] | None = None
    """Where each image lies in `store`; None if these are all of it, in order."""

    @property
    def images(self) -> UInt8[Tensor, "n c h w"]:
        """The images as one tensor: for a selection a copy in memory, meant for small ones."""
        return self.take(slice(None))

    def take(self, where: Int64[Tensor, " m"] | slice) -> UInt8[Tensor, "m c h w"]:
        """The images at some indices; a copy, except for a slice of a whole store."""
        return self.store[where if self.rows is None else self.rows[where]]

    def chunks(self) -> Iterator[UInt8[Tensor, "m c h w"]]:
        """All images in order, `CHUNK` at a time."""
        return (self.take(slice(start, start + CHUNK)) for start in range(0, len(self.labels), CHUNK))

    def select(self, indices: Int64[Tensor, " m"]) -> "Images":
        """The same images and labels at `indices`, without a copy of the images."""
        return Images(self.store, self.labels[indices], indices if self.rows is None else self.rows[indices])

    def to(self, device: torch.device) -> "Images":
        """The same on `device`: themselves where they lie there already, else a copy of these images only."""
        if device == self.store.device:
            return self
        images = torch.empty(len(self.labels), *self.store.shape[1:], dtype=torch.uint8, device=device)
        for part, chunk in zip(images.split(CHUNK), self.chunks(), strict=True):
            part.copy_(chunk)
        return Images(images, self.labels.to(device))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set: training and test images."""

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    recorded: str | None = None
    """The fingerprint that its file names; None for one of another program, and for what has no file."""
    path: Path | None = None
    """Its file."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        c, h, w = self.train.store.shape[1:]
        return c, h, w

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the SHA-256 of all images and labels.

        Whatever trains on a data set asks for it first. Raises `UserError` if it is not the one that the file names.
        """
        found = fingerprint(self.train, self.test)
        if self.recorded not in (None, found):
            raise UserError(
                f"{self.path} is damaged: its images and labels have the fingerprint {found}, not {self.recorded}, "
                f"which it names; delete it and run `cddlib data {self.name}` again."
            )
        return found

    @functools.cached_property
    def split(self) -> tuple[Images, Images]:
        """The training images in two parts: for training (nine tenths of every class) and for validation.

        Every selection uses the validation part; the test images are read once, at the end. The split is a fact of
        the data set, the same for every seed.
        """
        keep, held_out = stratified_split(self.train.labels, VALIDATION_FRACTION)
        return self.train.select(keep), self.train.select(held_out)


def fingerprint(train: Images, test: Images) -> str:
    """Sixteen hex digits of the SHA-256 of all images and labels."""
    digest = hashlib.sha256()
    for part in (train, test):
        digest.update(str((len(part.labels), *part.store.shape[1:])).encode())
        for chunk in part.chunks():
            digest.update(chunk.contiguous().numpy().data)
        digest.update(str(tuple(part.labels.shape)).encode())
        digest.update(part.labels.numpy().data)
    return digest.hexdigest()[:16]


def indices_by_class(labels: Int64[Tensor, " n"], classes: int = 0) -> tuple[Int64[Tensor, " _"], ...]:
    """For each class, at least for as many as `classes`, the indices of its images, ascending."""
    return labels.argsort(stable=True).split(labels.bincount(minlength=classes).tolist())


def stratified_split(labels: Int64[Tensor, " n"], fraction: float) -> tuple[Int64[Tensor, " a"], Int64[Tensor, " b"]]:
    """Two disjoint sets of indices that cover all: the second holds `fraction` of every class, at least one image."""
    rng = generator("split")
    keep, held_out = [], []
    for members in indices_by_class(labels):
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
    """The data set `name` from `<root>/<name>.safetensors`. Its images stay in the file until they are used.

    Raises:
        UserError: unknown name, data not prepared yet (says what to run), a file that is not what it should be, or
            scikit-learn missing.
    """
    check_data_name(name)
    if name == "digits":
        return _digits()
    path = (root or default_root()) / f"{name}.safetensors"
    if not path.exists():
        if path.parent.is_file():
            raise UserError(f"root is {path.parent}, which is a file; it must be the folder of the data sets.")
        source = " --source FOLDER" if name in FROM_FOLDER else ""
        raise UserError(f"{name} is not in {path.parent}; run `cddlib data {name}{source} --root {path.parent}` first.")
    return _read(name, path)


def _read(name: str, path: Path) -> Dataset:
    """Check a cached data set and map its images."""
    file = open_tensors(path, "np")  # "pt" maps it writable: refused if it is longer than the memory
    metadata = file.metadata() or {}
    if "dataset" not in metadata and "classes" in metadata:  # of another program, which records no fingerprint
        header = {"classes": parse_json(metadata["classes"], f"the header of {path}")}
    else:
        header = read_header(file, path, "dataset")
    classes, recorded = check_classes(header.get("classes"), path), header.get("fingerprint")
    with open(path, "rb") as stored:
        length = int.from_bytes(stored.read(8), "little")
        layout = json.loads(stored.read(length))  # what `open_tensors` has checked
    parts = {}
    with as_user_error(path, "a cddlib data set"):
        shape = layout["train_images"]["shape"][1:]
        for part in ("train", "test"):
            images, answers = layout[f"{part}_images"], layout[f"{part}_labels"]
            n = images["shape"][:1]
            found = f"{images['dtype']}{images['shape']} and {answers['dtype']}{answers['shape']}"
            if found != f"U8{n + shape} and I64{n}" or len(shape) != 3 or 0 in n + shape:
                raise TypeError(f"{part}_images and {part}_labels are {found}, not U8[n, c, h, w] and I64[n]")
            labels = torch.from_numpy(file.get_tensor(f"{part}_labels"))
            lowest, highest = labels.aminmax()
            if lowest < 0 or highest >= len(classes):
                raise TypeError(f"{part}_labels reach from {lowest} to {highest}, with {len(classes)} classes named")
            mapped = map_images(path, 8 + length + images["data_offsets"][0], tuple(images["shape"]))
            parts[part] = Images(mapped, labels)
        if recorded is not None and not re.fullmatch("[0-9a-f]{16}", recorded):
            raise TypeError(f"its fingerprint is {recorded:.99}")
    return Dataset(name, parts["train"], parts["test"], classes, recorded, path)


def map_images(path: Path, offset: int, shape: tuple[int, ...]) -> UInt8[Tensor, "n c h w"]:
    """The uint8 images that begin at byte `offset` of a file, mapped read-only."""
    array = np.memmap(path, np.uint8, "r", offset, shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


@functools.cache
def _digits() -> Dataset:
    """Scikit-learn's digits, one fifth of every class for testing."""
    with needing("the data set 'digits'", "scikit-learn"):
        from sklearn.datasets import load_digits
    bunch = load_digits()
    images = torch.from_numpy((bunch.images * 255 / 16).round().astype(np.uint8)).unsqueeze(1)
    every = Images(images, torch.from_numpy(bunch.target).long())
    train, test = stratified_split(every.labels, 0.2)
    return Dataset("digits", every.select(train), every.select(test), tuple(str(name) for name in bunch.target_names))


# --- Sizes ------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """How large a data set is."""

    shape: tuple[int, int, int]
    classes: int
    train: int
    test: int


_SIZES = {
    "fashion_mnist": Sizes((1, 28, 28), 10, 60_000, 10_000),
    "cifar10": Sizes((3, 32, 32), 10, 50_000, 10_000),
    "cifar100": Sizes((3, 32, 32), 100, 50_000, 10_000),
    "tiny_imagenet": Sizes((3, 64, 64), 200, 100_000, 10_000),
    "imagenet": Sizes((3, 64, 64), 1000, 1_281_167, 50_000),
}


def sizes_of(name: str, root: Path | None) -> Sizes:
    """How large a data set is; one of no fixed size has to be prepared already (`UserError`)."""
    if name in _SIZES:
        return _SIZES[name]
    dataset = load(name, root)
    return Sizes(dataset.shape, len(dataset.classes), len(dataset.train.labels), len(dataset.test.labels))

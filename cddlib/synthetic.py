"""The synthetic set: images, labels and the learned step size, all that distillation optimises.

A saved set is trainable without anything else: images in the network's input space, hard labels or label logits,
step size, and the preprocessing that leads to and from that space.
"""

import dataclasses
import reprlib
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from cddlib.data.dataset import Dataset, Images, indices_by_class
from cddlib.data.preprocessing import Preprocessing, Whitening, preprocessing_from
from cddlib.experts.buffer import PREPROCESSING, Buffer
from cddlib.runtime.errors import UserError, as_user_error, require
from cddlib.runtime.files import check_classes, read_tensors, tensor_digest, write_tensors
from cddlib.runtime.random import generator
from cddlib.training.epoch import fetch_real, predict


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """The synthetic set before the first iteration."""

    ipc: int = 1
    """Synthetic images per class."""
    init: Literal["real", "correct", "noise"] = "real"
    """Start from random real images, from real images that an expert classifies correctly (DATM), or from noise."""
    labels: Literal["hard", "learned", "teacher"] = "hard"
    """Hard; learned, logits that start as the experts' (DATM); or teacher, what the matched target says (TESLA)."""
    step_size: float = 0.01
    """The student's step size α before the first iteration."""

    def __post_init__(self) -> None:
        require(1, ipc=self.ipc)
        require(above=0, below=float("inf"), step_size=self.step_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticSet:
    """A synthetic set, class-major: the first `ipc` images belong to class 0."""

    images: Float[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]
    label_logits: Float[Tensor, "n classes"] | None
    """Learned soft labels, or None if `labels` are all there is."""
    step_size: Float[Tensor, ""]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    subsets: int = 1
    """Parts that were optimised one after the other and are learned so: the first, the first two, … all (SeqMatch)."""

    def subset(self, number: int) -> Int64[Tensor, " m"]:
        """Which images are in the subset of that number, on the CPU: of every class an equal share, in order."""
        return torch.nonzero(self._subsets() == number).flatten()

    def learned(self, number: int) -> Int64[Tensor, " m"]:
        """Which images a network learns while the subset of that number is optimised: it and those before it."""
        return torch.nonzero(self._subsets() <= number).flatten()

    def _subsets(self) -> Int64[Tensor, " n"]:
        return torch.arange(len(self.labels)) % self.ipc * self.subsets // self.ipc

    @property
    def ipc(self) -> int:
        """Images per class."""
        return len(self.labels) // len(self.classes)

    def targets(self) -> Float[Tensor, "n classes"]:
        """Class probabilities: softmax of the logits, or one-hot labels."""
        if self.label_logits is not None:
            return self.label_logits.softmax(dim=1)
        return F.one_hot(self.labels, len(self.classes)).to(self.images.dtype)

    def variable_tensors(self) -> dict[str, Tensor]:
        """What distillation optimises, by name: images, label logits if they are learned, step size."""
        found = {"images": self.images, "label_logits": self.label_logits, "step_size": self.step_size}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def variables(self) -> list[Tensor]:
        """What distillation optimises, in that order."""
        return list(self.variable_tensors().values())

    def copies(self, count: int) -> dict[str, Tensor]:
        """The variables by name, a row for each of several students, which need gradients of their own."""
        return {
            name: tensor.detach().expand(count, *tensor.shape).requires_grad_()
            for name, tensor in self.variable_tensors().items()
        }

    def targets_of(self, copies: dict[str, Tensor]) -> Float[Tensor, "s n classes"]:
        """The class probabilities that go with `copies`."""
        if self.label_logits is not None:
            return copies["label_logits"].softmax(dim=2)
        return self.targets().expand(len(copies["images"]), -1, -1)

    def copy(self) -> "SyntheticSet":
        """A set of its own memory, outside any graph."""
        copies: dict[str, Any] = {name: tensor.detach().clone() for name, tensor in self.variable_tensors().items()}
        return dataclasses.replace(self, **copies)

    def pictures(self) -> Float[Tensor, "n c h w"]:
        """The images as pixels between 0 and 1, for showing."""
        return self.preprocessing.inverse(self.images).clamp(0, 1)

    def to(self, device: torch.device) -> "SyntheticSet":
        """The same set on `device`."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.variable_tensors().items()}
        moved |= {"labels": self.labels.to(device), "preprocessing": self.preprocessing.to(device)}
        return dataclasses.replace(self, **moved)

    def save(self, path: Path, **metadata: object) -> None:
        """Write the set to a safetensors file, with class names and `metadata` as JSON in its header.

        The matrices of a whitening, far larger than the set, are in a file beside it, which several sets can share.

        Raises:
            UserError: that file holds another whitening.
        """
        tensors, fitted = {**self.variable_tensors(), "labels": self.labels}, self.preprocessing.tensors()
        if isinstance(self.preprocessing, Whitening):
            beside, digest = path.with_name(PREPROCESSING), tensor_digest(self.preprocessing.eigenvectors)
            if not beside.exists():
                write_tensors(beside, fitted, "preprocessing")
            elif tensor_digest(read_tensors(beside, "preprocessing")[0]["eigenvectors"]) != digest:
                raise UserError(f"{beside} holds another whitening than that of {path.name}; choose another folder.")
            metadata |= {"whitening": digest}
        else:
            tensors |= {f"preprocessing.{name}": value for name, value in fitted.items()}
        write_tensors(path, tensors, "synthetic", {"classes": self.classes, "subsets": self.subsets, **metadata})

    @staticmethod
    def load(path: Path) -> "SyntheticSet":
        """Read a set that `save` wrote; raises `UserError` if the file is anything else."""
        tensors, header = read_tensors(path, "synthetic")
        classes = check_classes(header.get("classes"), path)
        prefix = "preprocessing."
        fitted = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        if "whitening" in header:
            beside = path.with_name(PREPROCESSING)
            fitted = read_tensors(beside, "preprocessing")[0]
            if "eigenvectors" not in fitted or tensor_digest(fitted["eigenvectors"]) != header["whitening"]:
                raise UserError(f"{beside} does not hold the whitening of {path.name}.")
        with as_user_error(path, "a synthetic set"):
            _check_tensors(tensors, len(classes), header["subsets"])
            _, channels, height, width = tensors["images"].shape
            preprocessing = preprocessing_from(fitted, (channels, height, width))
            variables: dict[str, Any] = {"label_logits": None, **tensors}
            return SyntheticSet(**variables, preprocessing=preprocessing, classes=classes, subsets=header["subsets"])


def _check_tensors(tensors: dict[str, Tensor], classes: int, subsets: Any) -> None:
    """Raise an error of Python unless these are the tensors, and the number of subsets, of a synthetic set."""
    shape = tensors["images"].shape
    n, ipc = shape[0], shape[0] // classes
    wanted = {
        "images": (torch.float32, shape),
        "labels": (torch.int64, (n,)),
        "label_logits": (torch.float32, (n, classes)),
        "step_size": (torch.float32, ()),
    }
    for name, tensor in tensors.items():
        if (tensor.dtype, tensor.shape) != wanted[name] or not bool(tensor.isfinite().all()):
            raise TypeError(f"{name} is {tensor.dtype}{list(tensor.shape)}, or not finite")
    if 0 in shape or not torch.equal(tensors["labels"], torch.arange(classes).repeat_interleave(ipc)):
        raise TypeError(f"{n} labels are not those of {ipc} images for each of {classes} classes in turn")
    if not tensors["step_size"] > 0:
        raise TypeError(f"step size {tensors['step_size']}")
    if type(subsets) is not int or not 1 <= subsets <= ipc:
        raise TypeError(f"subsets {reprlib.repr(subsets)} of {ipc} images a class")


def random_real(train: Images, classes: int, ipc: int, rng: torch.Generator) -> Images:
    """`ipc` random images of every class, class-major.

    Raises:
        UserError: a class has fewer images.
    """
    chosen = []
    for label, members in enumerate(indices_by_class(train.labels, classes)):
        if len(members) < ipc:
            raise UserError(f"ipc is {ipc}, but class {label} has only {len(members)} images to choose from.")
        chosen.append(members[torch.randperm(len(members), generator=rng)[:ipc]])
    return train.select(torch.cat(chosen))


def initialise(
    config: SyntheticConfig, dataset: Dataset, buffer: Buffer, seed: int, device: torch.device, subsets: int = 1
) -> SyntheticSet:
    """The synthetic set before the first iteration; its real images come from the training part of the split.

    Label logits start as the logits that the experts' last parameters give the real image, averaged over the experts
    that are right about it, or over all if none is: as DATM has it with init `correct` (with `real`, its code asks its
    first expert alone). With noise images they are those of a real image of the class.

    Raises:
        UserError: a class has fewer than `ipc` images, or fewer that the expert gets right with init `correct`.
    """
    rng = generator(seed, "initialise")
    classes = len(dataset.classes)
    preprocessing = buffer.preprocessing.to(device)
    train = dataset.split[0]

    def expert_logits(expert: int, data: Images) -> Tensor:
        theta = buffer.parameters(expert, buffer.epochs).to(device)
        return predict(buffer.network, theta, fetch_real(data.to(device), preprocessing), len(data.labels)).cpu()

    if config.init == "correct":
        expert = int(torch.randint(len(buffer.experts), (), generator=rng))
        right = expert_logits(expert, train).argmax(1) == train.labels
        train = train.select(torch.nonzero(right).flatten())
    chosen = random_real(train, classes, config.ipc, rng)
    logits = None
    if config.labels != "hard":
        every = torch.stack([expert_logits(expert, chosen) for expert in range(len(buffer.experts))])
        right = (every.argmax(2) == chosen.labels).float()
        weight = torch.where(right.sum(0) > 0, right, 1.0)
        logits = (every * weight[:, :, None]).sum(0) / weight.sum(0)[:, None]
    images = buffer.preprocessing(chosen.images)
    if config.init == "noise":
        images = torch.randn(images.shape, generator=rng)
    return SyntheticSet(
        images=images,
        labels=chosen.labels,
        label_logits=logits,
        step_size=torch.tensor(config.step_size),
        preprocessing=buffer.preprocessing,
        classes=dataset.classes,
        subsets=subsets,
    ).to(device)

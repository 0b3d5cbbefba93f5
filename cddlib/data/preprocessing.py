"""What a network sees: an invertible map from pixels to its input.

Normalisation of each channel, or ZCA whitening as MTT and DATM use it on CIFAR. Everything made in a network's input
space carries its map with it.
"""

import abc
import dataclasses
import functools
import math
import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cddlib.data.dataset import FROM_FOLDER, Dataset, Images
from cddlib.runtime.device import free_memory
from cddlib.runtime.distributed import Ranks

# The published codes use CIFAR-10's numbers for CIFAR-100 too, and ImageNet's for everything cut from it.
_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_PUBLISHED = {"cifar10": _CIFAR, "cifar100": _CIFAR, **dict.fromkeys(FROM_FOLDER, _IMAGENET)}


@dataclasses.dataclass(frozen=True)
class Preprocessing(abc.ABC):
    """An invertible map from pixels to what a network sees. It is saved with whatever was made in its space."""

    mean: Float[Tensor, " d"]

    @abc.abstractmethod
    def __call__(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Pixels to network input, float32."""

    @abc.abstractmethod
    def inverse(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Network input to pixels, where 0 is black and 1 is white; not clipped."""

    def tensors(self) -> dict[str, Tensor]:
        """What defines the map, for a file."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to(self, device: torch.device) -> "Preprocessing":
        """The same map on `device`."""
        return type(self)(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


@dataclasses.dataclass(frozen=True)
class Normalisation(Preprocessing):
    """Subtract a mean and divide by a standard deviation, per channel."""

    std: Float[Tensor, " d"]

    def __call__(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return (images.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]

    def inverse(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return images * self.std[:, None, None] + self.mean[:, None, None]


@dataclasses.dataclass(frozen=True)
class Whitening(Preprocessing):
    """ZCA whitening W = U diag(s^-1/2) U^T of centred pixels in [0, 1], with its exact inverse U diag(s^1/2) U^T.

    s are the eigenvalues of the training set's pixel covariance (unbiased) plus 0.1, as MTT and DATM set it.
    """

    eigenvectors: Float[Tensor, "d d"]
    eigenvalues: Float[Tensor, " d"]

    @functools.cached_property
    def _matrices(self) -> tuple[Tensor, Tensor]:
        root, u = self.eigenvalues.sqrt(), self.eigenvectors
        return (u / root) @ u.T, (u * root) @ u.T

    def __call__(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return ((images.flatten(1).float() / 255 - self.mean) @ self._matrices[0]).view(images.shape)

    def inverse(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return (images.flatten(1) @ self._matrices[1] + self.mean).view(images.shape)

    def whitened(self, data: Images) -> Float[Tensor, "n c h w"] | None:
        """All of `data` whitened, as long as it lives; None where that takes more than a quarter of the free memory."""
        if data not in self._whitened:
            if 4 * len(data.labels) * len(self.mean) > free_memory(data.labels.device) // 4:
                return None
            parts: list[Tensor] = []
            with _progress("whitening", len(data.labels)) as bar:
                for chunk in data.chunks():
                    parts.append(self(chunk))
                    bar.update(len(chunk))
            self._whitened[data] = torch.cat(parts)
        return self._whitened[data]

    @functools.cached_property
    def _whitened(self) -> weakref.WeakKeyDictionary[Images, Tensor]:
        return weakref.WeakKeyDictionary()


def fit_preprocessing(dataset: Dataset, *, zca: bool, device: torch.device | None = None) -> Preprocessing:
    """The map for `dataset`, on the CPU: whitening fitted on all training images, or normalisation.

    A GPU, if it is the `device`, finds the whitening in a fraction of the time.
    Normalisation takes the published mean and standard deviation where there are some, else the training set's.
    """
    if zca:
        return _fit_whitening(dataset.train, device if device and device.type == "cuda" else torch.device("cpu"))
    if dataset.name in _PUBLISHED:
        mean, std = _PUBLISHED[dataset.name]
        return Normalisation(torch.tensor(mean), torch.tensor(std))
    pixels = dataset.train.images.double() / 255  # of the digits or Fashion-MNIST, which are small
    spread, centre = torch.std_mean(pixels, dim=(0, 2, 3), correction=0)
    return Normalisation(centre.float(), spread.float())


def _fit_whitening(train: Images, device: torch.device, epsilon: float = 0.1) -> Whitening:
    n, d = len(train.labels), train.store[0].numel()

    with _progress("fitting the whitening", 2 * n) as bar:

        def chunks() -> Iterator[Tensor]:
            for chunk in train.chunks():
                yield chunk.to(device).flatten(1).double() / 255
                bar.update(len(chunk))

        mean = cast(Tensor, sum(chunk.sum(0) for chunk in chunks())) / n
        covariance = torch.zeros(d, d, dtype=torch.float64, device=device)
        for chunk in chunks():
            covariance += (chunk - mean).T @ (chunk - mean)
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance / (n - 1))
    fitted = (mean, eigenvectors, eigenvalues.clamp(min=0) + epsilon)
    return Whitening(*(tensor.float().cpu() for tensor in fitted))


def _progress(what: str, images: int) -> Any:
    return Ranks().progress(desc=what, total=images, unit="image", unit_scale=True, leave=False)


def preprocessing_from(tensors: dict[str, Tensor], shape: tuple[int, int, int]) -> Preprocessing:
    """The map that `tensors()` gave to a file, for images of `shape` (channels, height, width).

    Raises:
        TypeError: they are not the tensors of one.
    """
    kind, divisor = (Whitening, "eigenvalues") if "eigenvalues" in tensors else (Normalisation, "std")
    d = math.prod(shape) if kind is Whitening else shape[0]
    wanted = {"mean": [d], divisor: [d], **({"eigenvectors": [d, d]} if kind is Whitening else {})}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        raise TypeError(f"its shapes are {found}, not {wanted}")
    if not all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise TypeError("its numbers are not finite float32")
    if not bool((tensors[divisor] > 0).all()):
        raise TypeError(f"{divisor} has to be positive")
    return kind(**tensors)

"""Differentiable siamese augmentation (DSA): the same random change for every image set that must be comparable.

Every step draws one of the six changes for the whole batch, with parameters of its own for each image; gradients
flow through it to the images. A draw is a value: the backward walk of the student applies the draws of the forward
pass again. `torchvision.transforms.v2` cannot stand in: it draws one parameter a batch, from the global generator,
and clips colours to [0, 1], while DSA works in normalised or whitened space.

Source: Zhao & Bilen, Dataset Condensation with Differentiable Siamese Augmentation (2021), with the strengths that
MTT and its successors use.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cddlib.runtime.device import upload
from cddlib.runtime.errors import UserError

SCALE = 1.2  # factor, along each axis, between 1 / SCALE and SCALE
ROTATE = 15.0  # degrees, either way
CROP = 0.125  # largest shift, as a fraction of a side
CUTOUT = 0.5  # side of the erased square, as a fraction of a side
BRIGHTNESS = 1.0  # width of the interval that is added
SATURATION = 2.0  # upper end of the factor on the distance from the grey image
CONTRAST = 0.5  # lower end of the factor on the distance from the mean; the upper end is 1 more
FLIP = 0.5  # probability


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Which changes augmentation draws from, for experts, students and evaluation alike."""

    augment: str = "color_crop_cutout_flip_scale_rotate"
    """Changes joined by _, out of color, crop, cutout, flip, scale, rotate; or none."""

    def __post_init__(self) -> None:
        names = self.augment.split("_")
        if self.augment != "none" and (not set(names) <= CHANGES.keys() or len(set(names)) < len(names)):
            raise UserError(f"augment is {self.augment!r}; join some of {', '.join(CHANGES)} with _, or say none.")


class Draw(NamedTuple):
    """One step's change and its random numbers, uniform in [0, 1), one row an image."""

    change: str
    numbers: Float[Tensor, "b 3"]


def draw(strategy: str, batch: int, generator: torch.Generator) -> Draw | None:
    """Draw a change from `strategy` for `batch` images; None if the strategy is `none`."""
    if strategy == "none":
        return None
    names = strategy.split("_")
    change = names[int(torch.randint(len(names), (), generator=generator))]
    return Draw(change, torch.rand(batch, 3, generator=generator))


def apply(drawn: Draw | None, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """`images` after the change; differentiable with respect to them."""
    if drawn is None:
        return images
    return CHANGES[drawn.change](images, upload(drawn.numbers, images.device).to(images.dtype))


def _column(numbers: Tensor, index: int) -> Tensor:
    """One random number an image, shaped to multiply images."""
    return numbers[:, index, None, None, None]


def _color(x: Tensor, u: Tensor) -> Tensor:
    x = x + (_column(u, 0) - 0.5) * BRIGHTNESS
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * (_column(u, 1) * SATURATION) + grey
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (_column(u, 2) + CONTRAST) + mean


def _crop(x: Tensor, u: Tensor) -> Tensor:
    """Shift by whole pixels; what comes in from outside is 0."""
    b, _, h, w = x.shape
    reach_h, reach_w = int(h * CROP + 0.5), int(w * CROP + 0.5)
    rows = torch.arange(h, device=x.device) + (u[:, 0, None] * (2 * reach_h + 1)).long()
    columns = torch.arange(w, device=x.device) + (u[:, 1, None] * (2 * reach_w + 1)).long()
    padded = F.pad(x, (reach_w, reach_w, reach_h, reach_h))
    image = torch.arange(b, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cutout(x: Tensor, u: Tensor) -> Tensor:
    """Set a square to 0. Its centre lies anywhere in the image; what sticks out is lost."""
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    for axis, size in ((2, x.shape[2]), (3, x.shape[3])):
        side = int(size * CUTOUT + 0.5)
        start = (u[:, axis - 2] * (size + 1 - side % 2)).long() - side // 2
        position = torch.arange(size, device=x.device) - start[:, None]
        hit = (position >= 0) & (position < side)
        inside = inside & (hit[:, None, :, None] if axis == 2 else hit[:, None, None, :])
    return x * ~inside


def _flip(x: Tensor, u: Tensor) -> Tensor:
    return torch.where(_column(u, 0) < FLIP, x.flip(3), x)


def _scale(x: Tensor, u: Tensor) -> Tensor:
    factors = u * (SCALE - 1 / SCALE) + 1 / SCALE
    return _warp(x, torch.diag_embed(factors[:, :2]))


def _rotate(x: Tensor, u: Tensor) -> Tensor:
    angle = (u[:, 0] - 0.5) * (2 * ROTATE * math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    return _warp(x, torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2))


def _warp(x: Tensor, matrix: Float[Tensor, "b 2 2"]) -> Tensor:
    """Sample bilinearly at `matrix` times the coordinates, which run from -1 to 1; outside is 0."""
    grid = F.affine_grid(F.pad(matrix, (0, 1)), list(x.shape), align_corners=True)
    return F.grid_sample(x, grid, align_corners=True)


CHANGES = {"color": _color, "crop": _crop, "cutout": _cutout, "flip": _flip, "scale": _scale, "rotate": _rotate}

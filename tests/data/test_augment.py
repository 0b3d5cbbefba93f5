"""Augmentation against slow, obvious references, one image at a time."""

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor
from works import refusal

import cddlib
from cddlib.data.augment import CHANGES, AugmentConfig, Draw, apply, draw

ALL = "color_crop_cutout_flip_scale_rotate"
ALMOST_1 = 1 - 2**-24  # the largest float32 below 1
Array = np.ndarray


def some_images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=cddlib.generator("images", *shape), dtype=torch.double)


# --- References -------------------------------------------------------------------------------------------------


def color(x: Array, u: list[float]) -> Array:
    x = x + (u[0] - 0.5)
    grey = x.mean(axis=0)
    x = 2 * u[1] * (x - grey) + grey
    return (u[2] + 0.5) * (x - x.mean()) + x.mean()


def crop(x: Array, u: list[float]) -> Array:
    _, h, w = x.shape
    reach_h, reach_w = math.floor(0.125 * h + 0.5), math.floor(0.125 * w + 0.5)
    down, right = int(u[0] * (2 * reach_h + 1)) - reach_h, int(u[1] * (2 * reach_w + 1)) - reach_w
    around = np.pad(x, ((0, 0), (reach_h, reach_h), (reach_w, reach_w)))
    return around[:, reach_h + down :, reach_w + right :][:, :h, :w]


def cutout(x: Array, u: list[float]) -> Array:
    _, h, w = x.shape
    side_h, side_w = math.floor(0.5 * h + 0.5), math.floor(0.5 * w + 0.5)
    centres_h, centres_w = (h if side_h % 2 else h + 1), (w if side_w % 2 else w + 1)
    top, left = int(u[0] * centres_h) - side_h // 2, int(u[1] * centres_w) - side_w // 2
    y = x.copy()
    y[:, max(0, top) : top + side_h, max(0, left) : left + side_w] = 0
    return y


def flip(x: Array, u: list[float]) -> Array:
    return x[:, :, ::-1] if u[0] < 0.5 else x


def scale(x: Array, u: list[float]) -> Array:
    across, down = (1 / 1.2 + v * (1.2 - 1 / 1.2) for v in u[:2])
    return sampled(x, lambda a, b: (across * a, down * b))


def rotate(x: Array, u: list[float]) -> Array:
    angle = math.radians(30 * (u[0] - 0.5))
    cos, sin = math.cos(angle), math.sin(angle)
    return sampled(x, lambda a, b: (cos * a - sin * b, sin * a + cos * b))


def sampled(x: Array, source: Callable[[Array, Array], tuple[Array, Array]]) -> Array:
    """Bilinear sampling. `source` maps (across, down); -1 and 1 are the centres of the outermost pixels."""
    _, h, w = x.shape
    across, down = source(*np.meshgrid(np.linspace(-1, 1, w), np.linspace(-1, 1, h)))
    places = [(down + 1) / 2 * (h - 1), (across + 1) / 2 * (w - 1)]
    return np.stack([map_coordinates(channel, places, order=1, mode="grid-constant") for channel in x])


REFERENCES = {"color": color, "crop": crop, "cutout": cutout, "flip": flip, "scale": scale, "rotate": rotate}


def test_every_change_has_a_reference() -> None:
    assert CHANGES.keys() == REFERENCES.keys() == set(AugmentConfig().augment.split("_"))


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 7, 9), (1, 5, 6), (3, 32, 32)])
@pytest.mark.parametrize("change", CHANGES)
def test_each_image_is_changed_as_its_reference_says(change: str, shape: tuple[int, int, int]) -> None:
    """Also at the ends of the draw."""
    images, drawn = some_images(16, *shape), draw(change, 12, cddlib.generator(change))
    assert drawn is not None
    ends = [[a, b, 0.5] for a in (0.0, ALMOST_1) for b in (0.0, ALMOST_1)]
    numbers = torch.cat([drawn.numbers, torch.tensor(ends)])
    pairs = zip(images.numpy(), numbers.tolist(), strict=True)
    wanted = np.stack([REFERENCES[change](image, found) for image, found in pairs])
    for dtype, tolerance in ((torch.float, 1e-3), (torch.double, 1e-10)):
        found = apply(Draw(change, numbers), images.to(dtype))
        assert found.dtype == dtype
        np.testing.assert_allclose(found.double(), wanted, rtol=0, atol=tolerance)


# --- Draws ------------------------------------------------------------------------------------------------------


def test_one_change_a_step_all_equally_likely() -> None:
    rng = cddlib.generator("changes")
    counts: Counter[str] = Counter()
    for _ in range(1200):
        drawn = draw(ALL, 2, rng)
        assert drawn is not None
        counts[drawn.change] += 1
    assert counts.keys() == CHANGES.keys()
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 20.5  # chi-square, 5 degrees, p = 0.001
    assert {found.change for found in (draw("crop_flip", 1, rng) for _ in range(50)) if found} == {"crop", "flip"}


def test_none_changes_nothing() -> None:
    images = some_images(2, 1, 4, 4)
    assert AugmentConfig(augment="none").augment == "none"
    assert draw("none", 2, cddlib.generator("none")) is None
    assert apply(None, images) is images


@pytest.mark.parametrize("strategy", ["", "colour", "crop_crop", "crop-flip", "none_crop", "crop_", "Crop"])
def test_other_strategies_are_refused(strategy: str) -> None:
    said = f"augment is {strategy!r}; join some of color, crop, cutout, flip, scale, rotate with _, or say none."
    assert refusal(AugmentConfig, augment=strategy) == said

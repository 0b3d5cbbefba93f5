"""EWC and SI on images: what no setting may do. The optimiser's tests have their formulas."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

import cddlib
from cddlib.distillation.consolidation import ConsolidateConfig, Consolidation

SHAPE = (2, 1, 3, 2)
KINDS = ("ewc", "si")


def draw(*keys: int | str) -> Tensor:
    """Numbers of the images' shape."""
    return torch.randn(SHAPE, generator=cddlib.generator("consolidate", *keys)).double()


@hypothesis.given(strength=st.floats(1e-30, 1e308), kind=st.sampled_from(KINDS), every=st.integers(1, 4))
def test_no_strength_overshoots_the_reference(strength: float, kind: str, every: int) -> None:
    config = ConsolidateConfig(consolidation=kind, consolidate_every=every, consolidation_strength=strength)
    images = draw("start")
    held = Consolidation(config, images)
    for iteration in range(1, 10):
        before, anchor = images.clone(), held.tensors["reference"].clone()
        images += 0.1 * draw("step", iteration)
        stepped = images.clone()
        held.after_step(images, before, draw("gradient", iteration), torch.arange(len(images)), iteration)
        lower, upper = torch.minimum(stepped, anchor), torch.maximum(stepped, anchor)
        assert ((lower - 1e-12 <= images) & (images <= upper + 1e-12)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_stand_still_keep_everything_finite(kind: str) -> None:
    images = draw("start")
    held = Consolidation(ConsolidateConfig(consolidation=kind, consolidate_every=2), images)
    for iteration in range(1, 13):
        held.after_step(images, images.clone(), draw("gradient", iteration), torch.arange(len(images)), iteration)
    assert all(tensor.isfinite().all() for tensor in held.tensors.values())
    assert torch.equal(images, draw("start"))
    assert not held.tensors["gathered"].any()

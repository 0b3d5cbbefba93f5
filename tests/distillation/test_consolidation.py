"""EWC and SI on images: against loops over pixels, and what no setting may do."""

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


def run(config: ConsolidateConfig, iterations: int, *, still: int = -1) -> tuple[list[Tensor], Consolidation]:
    """Images after each iteration of random steps; from iteration `still` on the optimiser moves nothing."""
    images = draw("start").requires_grad_()
    held = Consolidation(config, images)
    found = []
    for iteration in range(1, iterations + 1):
        before = images.detach().clone()
        if still < 0 or iteration < still:
            with torch.no_grad():
                images += 0.1 * draw("step", iteration)
        held.after_step(images, before, draw("gradient", iteration), iteration)
        found.append(images.detach().clone())
    return found, held


def reference(config: ConsolidateConfig, iterations: int) -> list[list[float]]:
    """The same with plain numbers, from the papers: F = Σ g², or Ω = Σ −g Δx over (its way² + ξ), and the pull."""
    x = draw("start").flatten().tolist()
    pixels = range(len(x))
    anchor = list(x)
    omega = [0.0 for _ in pixels]
    gathered = [0.0 for _ in pixels]
    found = []
    for iteration in range(1, iterations + 1):
        step = (0.1 * draw("step", iteration)).flatten().tolist()
        g = draw("gradient", iteration).flatten().tolist()
        for p in pixels:
            gathered[p] += g[p] ** 2 if config.consolidation == "ewc" else -g[p] * step[p]
            x[p] += step[p]
        average = sum(omega) / len(omega)
        for p in pixels:
            if average > 0:
                x[p] = anchor[p] + (x[p] - anchor[p]) / (1 + config.consolidation_strength * omega[p] / average)
        if iteration % config.consolidate_every == 0:
            squares = [(x[p] - anchor[p]) ** 2 for p in pixels]
            for p in pixels:
                if config.consolidation == "ewc":
                    omega[p] += gathered[p]
                else:
                    omega[p] += max(gathered[p], 0) / (squares[p] + sum(squares) / len(squares))
            anchor = list(x)
            gathered = [0.0 for _ in pixels]
        found.append(list(x))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("every", "strength"), [(1, 0.1), (3, 0.1), (3, 5.0), (4, 1e6)])
def test_against_a_loop_over_pixels(kind: str, every: int, strength: float) -> None:
    config = ConsolidateConfig(consolidation=kind, consolidate_every=every, consolidation_strength=strength)
    found, _ = run(config, 13)
    for images, wanted in zip(found, reference(config, 13), strict=True):
        assert images.flatten().tolist() == pytest.approx(wanted, rel=1e-9)


@hypothesis.given(strength=st.floats(1e-30, 1e308), kind=st.sampled_from(KINDS), every=st.integers(1, 4))
def test_no_strength_overshoots_the_reference(strength: float, kind: str, every: int) -> None:
    config = ConsolidateConfig(consolidation=kind, consolidate_every=every, consolidation_strength=strength)
    images = draw("start")
    held = Consolidation(config, images)
    for iteration in range(1, 10):
        before, anchor = images.clone(), held.tensors["reference"].clone()
        images += 0.1 * draw("step", iteration)
        stepped = images.clone()
        held.after_step(images, before, draw("gradient", iteration), iteration)
        lower, upper = torch.minimum(stepped, anchor), torch.maximum(stepped, anchor)
        assert ((lower - 1e-12 <= images) & (images <= upper + 1e-12)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("still", [1, 5])
def test_images_that_stand_still_keep_everything_finite(kind: str, still: int) -> None:
    config = ConsolidateConfig(consolidation=kind, consolidate_every=2)
    found, held = run(config, 12, still=still)
    assert all(tensor.isfinite().all() for tensor in held.tensors.values())
    assert torch.equal(found[11], found[still + 1])
    assert not held.tensors["gathered"].any()

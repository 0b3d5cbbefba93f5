"""EWC and SI on images: against loops over pixels, and what no setting may do."""

import dataclasses

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
            gathered[p] += g[p] ** 2 if config.consolidation.consolidation == "ewc" else -g[p] * step[p]
            x[p] += step[p]
        average = sum(omega) / len(omega)
        for p in pixels:
            if average > 0:
                x[p] = anchor[p] + (x[p] - anchor[p]) / (
                    1 + config.consolidation.consolidation_strength * omega[p] / average
                )
        if iteration % config.consolidation.consolidate_every == 0:
            squares = [(x[p] - anchor[p]) ** 2 for p in pixels]
            for p in pixels:
                if config.consolidation.consolidation == "ewc":
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


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_pulled_before_the_first_consolidation(kind: str) -> None:
    config = ConsolidateConfig(consolidation=kind, consolidate_every=5, consolidation_strength=1e3)
    found, _ = run(config, 6)
    free = draw("start")
    for iteration, images in enumerate(found, start=1):
        free = free + 0.1 * draw("step", iteration)
        assert torch.equal(images, free) == (iteration <= 5)


def test_at_mean_importance_the_pull_is_the_strength() -> None:
    config = ConsolidateConfig(consolidation="ewc", consolidate_every=1, consolidation_strength=0.25)
    images = torch.zeros(SHAPE)
    held = Consolidation(config, images)
    held.after_step(images, images.clone(), torch.ones(SHAPE), 1)
    images += 1
    held.after_step(images, images - 1, torch.ones(SHAPE), 2)
    assert images.flatten().tolist() == pytest.approx([1 / 1.25] * images.numel())


def test_si_by_hand() -> None:
    config = ConsolidateConfig(consolidation="si", consolidate_every=2)
    images = torch.zeros(1, 1, 1, 4)
    held = Consolidation(config, images)
    for iteration in (1, 2):
        before = images.clone()
        images += torch.tensor([1.0, -1.0, 1.0, 0.0])
        held.after_step(images, before, torch.tensor([-3.0, 3.0, 3.0, 9.0]).reshape(images.shape), iteration)
    # each moved pixel went a way of 2 and took 6 off the loss, or added 6; ξ is the mean of 4, 4, 4, 0
    assert held.tensors["importance"].flatten().tolist() == pytest.approx([6 / (4 + 3), 6 / (4 + 3), 0, 0])


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
def test_the_stronger_the_pull_the_nearer_to_the_reference(kind: str) -> None:
    def way(strength: float) -> float:
        config = ConsolidateConfig(consolidation=kind, consolidate_every=4, consolidation_strength=strength)
        found, _ = run(config, 6)
        return float((found[5] - found[3]).norm())

    ways = [way(strength) for strength in (0.01, 0.1, 1.0, 10.0)]
    assert ways == sorted(ways, reverse=True)
    assert ways[3] < 0.9 * ways[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.1, 1e9])
def test_a_pixel_without_importance_is_never_moved(kind: str, strength: float) -> None:
    config = ConsolidateConfig(consolidation=kind, consolidate_every=2, consolidation_strength=strength)
    images = draw("start")
    held = Consolidation(config, images)
    free, others_are_pulled = images[0].clone(), False
    for iteration in range(1, 9):
        before = images.clone()
        images += 0.1 * draw("step", iteration)
        free += 0.1 * draw("step", iteration)[0]
        stepped = images.clone()
        gradient = draw("gradient", iteration)
        gradient[0] = 0
        held.after_step(images, before, gradient, iteration)
        assert held.tensors["importance"][0].eq(0).all()
        torch.testing.assert_close(images[0], free, rtol=0, atol=1e-14)
        others_are_pulled |= bool((images[1] - stepped[1]).abs().max() > 1e-3)
    assert others_are_pulled


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("still", [1, 5])
def test_images_that_stand_still_keep_everything_finite(kind: str, still: int) -> None:
    config = ConsolidateConfig(consolidation=kind, consolidate_every=2)
    found, held = run(config, 12, still=still)
    assert all(tensor.isfinite().all() for tensor in held.tensors.values())
    assert torch.equal(found[11], found[still + 1])
    assert not held.tensors["gathered"].any()


def test_the_consolidation_starts_at_the_images_and_owns_its_tensors() -> None:
    images = draw("start").requires_grad_()
    held = Consolidation(ConsolidateConfig(consolidation="si"), images)
    assert torch.equal(held.tensors["reference"], images.detach())
    assert not held.tensors["importance"].any()
    assert not held.tensors["gathered"].any()
    assert not any(tensor.requires_grad for tensor in held.tensors.values())
    assert len({tensor.data_ptr() for tensor in (images, *held.tensors.values())}) == 4


def test_gathering_starts_anew_after_a_consolidation() -> None:
    _, held = run(ConsolidateConfig(consolidation="ewc", consolidate_every=4), 4)
    assert not held.tensors["gathered"].any()
    wanted = sum(draw("gradient", iteration).square() for iteration in range(1, 5))
    torch.testing.assert_close(held.tensors["importance"], wanted)
    _, held = run(ConsolidateConfig(consolidation="ewc", consolidate_every=4), 5)
    torch.testing.assert_close(held.tensors["gathered"], draw("gradient", 5).square())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"consolidation_strength": 0.0}, "consolidation_strength is 0.0; it must be a finite number above 0."),
        ({"consolidation_strength": -1.0}, "consolidation_strength is -1.0; it must be a finite number above 0."),
        (
            {"consolidation_strength": float("inf")},
            "consolidation_strength is inf; it must be a finite number above 0.",
        ),
        (
            {"consolidation_strength": float("nan")},
            "consolidation_strength is nan; it must be a finite number above 0.",
        ),
        ({"consolidate_every": 0}, "consolidate_every is 0; it must be at least 1."),
        ({"consolidate_every": -2}, "consolidate_every is -2; it must be at least 1."),
    ],
)
def test_bad_settings_are_refused(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(cddlib.UserError) as refused:
        ConsolidateConfig(**values)
    assert str(refused.value) == sentence
    with pytest.raises(cddlib.UserError):
        dataclasses.replace(cddlib.distill_recipe(), **values)

"""The optimiser of the set, against plain arithmetic on every variable; EWC and SI, and what no setting may do."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from running import first
from torch import Tensor

import cddlib
from cddlib.distillation.consolidation import ConsolidateConfig, Consolidation
from cddlib.distillation.optimizer import OptimizerConfig, SetOptimizer

RATES = {"lr_images": 3.0, "lr_labels": 0.5, "lr_step_size": 0.01}
MOMENTA = {"momentum_images": 0.7, "momentum_labels": 0.9, "momentum_step_size": 0.3}
CONFIG = OptimizerConfig(**RATES, **MOMENTA, ema=0.8)


def drawn(shapes: dict[str, Tensor], iteration: int, rows: list[int]) -> dict[str, Tensor]:
    """Gradients that are zero for all other images, as those of a subset are."""
    rng = cddlib.generator("gradients", iteration)
    found = {name: torch.randn(variable.shape, generator=rng) for name, variable in shapes.items()}
    for name in ("images", "label_logits"):
        found[name][[row for row in range(len(found[name])) if row not in rows]] = 0
    return found


@pytest.mark.parametrize(
    ("kind", "halves"), [(kind, halves) for kind in ("none", "ewc", "si") for halves in (False, True)]
)
@pytest.mark.parametrize(("every", "strength"), [(1, 0.1), (2, 0.5), (3, 1e6)])
def test_a_step_is_sgd_then_consolidation_then_the_average(
    buffer: cddlib.Buffer, recipe, kind: str, halves: bool, every: int, strength: float
) -> None:
    """v ← m v + g and x ← x − r v for the images that an iteration optimises; momentum moves no other image.

    Importance is F = Σ g² (EWC), or Ω = Σ −g Δx over (its way² + ξ) (SI).
    """
    held = ConsolidateConfig(consolidation=kind, consolidation_strength=strength, consolidate_every=every)
    synthetic = first(recipe(ipc=1, labels="learned"), buffer)
    optimizer = SetOptimizer(CONFIG, held, synthetic)
    x = synthetic.copy().variable_tensors()
    start, velocity = x["images"].clone(), {name: torch.zeros_like(variable) for name, variable in x.items()}
    reference, average = start.clone(), start.clone()
    omega, gathered = torch.zeros_like(start), torch.zeros_like(start)
    for iteration in range(6):
        rows = list(range(10)) if not halves else list(range(5)) if iteration < 3 else list(range(5, 10))
        gradients = drawn(x, iteration, rows)
        optimizer.step(list(gradients.values()), torch.tensor(rows), iteration + 1)
        before = x["images"].clone()
        for (name, variable), rate, momentum in zip(x.items(), RATES.values(), MOMENTA.values(), strict=True):
            velocity[name] = momentum * velocity[name] + gradients[name]
            change = rate * velocity[name]
            if name == "step_size":
                variable -= change
            else:
                variable[rows] -= change[rows]
        images = x["images"]
        gathered += gradients["images"] ** 2 if kind == "ewc" else -gradients["images"] * (images - before)
        if kind != "none" and iteration >= every:
            images[rows] -= ((images - reference) * (1 - 1 / (1 + strength * omega / omega.mean())))[rows]
        if iteration % every == every - 1:
            way = (images - reference) ** 2
            omega += gathered if kind == "ewc" else gathered.clamp(min=0) / (way + way.mean())
            reference, gathered = images.clone(), torch.zeros_like(images)
        average[rows] = 0.8 * average[rows] + 0.2 * images[rows]
    for name, variable in synthetic.variable_tensors().items():
        torch.testing.assert_close(variable.detach(), x[name], rtol=1e-4, atol=1e-4)
    plain, candidate = optimizer.candidates()
    assert torch.equal(plain.images, synthetic.images)
    torch.testing.assert_close(candidate.images, average, rtol=1e-4, atol=1e-4)
    assert (average - x["images"]).abs().max() > 0.1
    assert torch.equal(candidate.label_logits, synthetic.label_logits)


# --- Consolidation ----------------------------------------------------------------------------------------------

KINDS = ("ewc", "si")


def draw(*keys: int | str) -> Tensor:
    """Numbers of a shape of images."""
    return torch.randn(2, 1, 3, 2, generator=cddlib.generator("consolidate", *keys)).double()


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

"""The guard: runs whose numbers are beyond use stop with a sentence, and what was good before them is kept."""

from pathlib import Path

import pytest
import torch
from running import distill, first, loop
from works import metrics

import cddlib
from cddlib.distillation import guard
from cddlib.distillation.checkpoint import State
from cddlib.distillation.config import DistillConfig
from cddlib.distillation.gradient import concurrent_gradient
from cddlib.distillation.guard import check_losses
from cddlib.experts.buffer import Buffer
from cddlib.runtime.errors import Diverged
from cddlib.runtime.files import read_json

AGAIN = "the checkpoint holds iteration 2; start again in another folder with a lower"
RECORD = {"matched": [[1, 0], [1, 2], [0, 3]], "losses": [0.5, 0.5, 0.5], "gradient_norms": [1.0, 1.0, 1.0]}
"""A line of an iteration of two segments and one replayed."""


@pytest.fixture
def at_4(buffer: Buffer, recipe) -> tuple[State, DistillConfig]:
    """A state after four iterations, whose checkpoint holds two."""
    config = recipe(step_size=0.05, lr_step_size=10.0, labels="learned")
    state = State(config, first(config, buffer))
    state.progress.iteration, state.saved_at = 4, 2
    return state, config


@pytest.mark.parametrize(
    ("number", "loss", "norm", "said"),
    [
        (1, float("nan"), 1.0, "the segment from epoch 2 of expert 1: its loss is nan and its gradient's norm 1"),
        (2, float("inf"), 1.0, "the segment from epoch 3 of expert 0: its loss is inf and its gradient's norm 1"),
        (0, 0.5, float("nan"), "the segment from epoch 0 of expert 1: its loss is 0.5 and its gradient's norm nan"),
    ],
)
def test_numbers_that_are_not_finite_name_the_segment(at_4, number: int, loss: float, norm: float, said: str) -> None:
    record = {key: list(values) for key, values in RECORD.items()}
    record["losses"][number], record["gradient_norms"][number] = loss, norm
    with pytest.raises(Diverged) as stopped:
        check_losses(*at_4, {**record, "loss": loss})
    assert str(stopped.value) == f"iteration 5, {said}; {AGAIN} --lr-images or --step-size."


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_losses_that_stay_above_the_guard_stop_the_run(at_4, monkeypatch, threshold: float | None) -> None:
    """Without a threshold of the user's, no iteration is skipped."""
    monkeypatch.setattr(guard, "MOST_ABOVE", 3)
    limit = 100.0 if threshold is None else threshold
    state, config = at_4[0], cddlib.replace(at_4[1], loss_threshold=threshold)
    skipped = [check_losses(state, config, {**RECORD, "loss": loss}) for loss in (1.01 * limit, limit, 2 * limit, 1e9)]
    assert skipped == [above and threshold is not None for above in (True, False, True, True)]
    assert state.progress.above_in_a_row == 2
    with pytest.raises(Diverged) as stopped:
        check_losses(state, config, {**RECORD, "loss": 1e9})
    assert str(stopped.value) == (
        f"iteration 5, segments from epochs [0, 2] of expert 1: the loss has been above {limit:g} for 3 iterations; "
        f"{AGAIN} --step-size or --lr-images, or with a higher --loss-threshold."
    )


def test_the_guard_skips_iterations_of_high_loss(buffer: Buffer, recipe, tmp_path: Path, monkeypatch) -> None:
    config = recipe(validate_every=0, iterations=4, ema=0.5, loss_threshold=1.0, labels="teacher")

    def told(config, buffer, synthetic, iteration, *ranks):
        gradients, record = concurrent_gradient(config, buffer, synthetic, iteration, *ranks)
        return gradients, {**record, "loss": (0.5, 1.5, 1.0, 2.0)[iteration]}

    monkeypatch.setattr(loop, "concurrent_gradient", told)
    distill(config, buffer, tmp_path / "some")
    lines = metrics(tmp_path / "some")
    assert [line["skipped"] for line in lines[1:]] == [False, True, False, True]
    assert lines[2]["step_size"] == lines[1]["step_size"] != lines[3]["step_size"]
    assert read_json(tmp_path / "some" / "result.json")["iterations_skipped"] == 2
    never = distill(cddlib.replace(config, loss_threshold=0.1), buffer, tmp_path / "none")
    assert torch.equal(never.images, first(config, buffer).images)
    assert torch.equal(never.label_logits, first(config, buffer).label_logits)
    assert never.step_size == torch.tensor(config.synthetic.step_size)

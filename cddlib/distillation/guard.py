"""When a run stops on its own: what is no longer usable, and what to change."""

import json
import math
from typing import Any

from cddlib.distillation.checkpoint import State
from cddlib.distillation.config import DistillConfig
from cddlib.runtime.errors import Diverged

MOST_ABOVE = 100
"""Iterations in a row whose loss may be above the guard before the run stops."""
LARGEST_LOSS = 100.0
"""The guard of a run that sets none: the student ends ten times as far from the target as it began."""
LARGEST_STEP_SIZE = 100.0
"""The largest step size, times the first."""


def check_losses(state: State, config: DistillConfig, record: dict[str, Any]) -> bool:
    """Whether DATM's guard skips the iteration of `record`; raises `Diverged` if its losses are beyond use."""
    number = state.iteration + 1
    for (expert, start), loss, norm in zip(record["matched"], record["losses"], record["gradient_norms"], strict=True):
        if not loss + norm < math.inf:
            raise Diverged(
                f"iteration {number}, the segment from epoch {start} of expert {expert}: its loss is {loss:g} "
                f"and its gradient's norm {norm:g}; {_start_again(state)} --lr-images or --step-size."
            )
    limit = LARGEST_LOSS if config.loss_threshold is None else config.loss_threshold
    above = record["loss"] > limit
    state.progress.above_in_a_row = state.progress.above_in_a_row + 1 if above else 0
    if state.progress.above_in_a_row == MOST_ABOVE:
        raise Diverged(
            f"{_iteration(state, record)}the loss has been above {limit:g} for {MOST_ABOVE} iterations; "
            f"{_start_again(state)} --step-size or --lr-images, or with a higher --loss-threshold."
        )
    return above and config.loss_threshold is not None


def check_set(state: State, config: DistillConfig, record: dict[str, Any]) -> None:
    """Raise `Diverged` if the set is beyond use after the step of `record`."""
    where, again = _iteration(state, record), _start_again(state)
    *variables, step_size = state.synthetic.variables()
    if not all(bool(variable.isfinite().all()) for variable in variables):
        raise Diverged(f"{where}images or label logits are no longer finite; {again} --lr-images or --lr-labels.")
    first = config.synthetic.step_size
    if not 0 < step_size.item() < LARGEST_STEP_SIZE * first:
        raise Diverged(
            f"{where}the step size became {step_size.item():g}, from {first:g} at first; {again} --lr-step-size "
            f"({config.optimizer.lr_step_size:g})."
        )


def check_finite(state: State, name: str, value: Any) -> None:
    """Raise `Diverged` for a measurement with numbers that are not finite."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        now, step = state.iteration, float(state.synthetic.step_size)
        saved = f"the checkpoint holds iteration {state.saved_at}; " if now else ""
        raise Diverged(
            f"iteration {now}: {name} is not finite, at the step size {step:g}; {saved}start again in another "
            f"folder with a lower --step-size, --lr-step-size or --lr-images."
        ) from None


def _iteration(state: State, record: dict[str, Any]) -> str:
    expert = record["matched"][0][0]
    starts = [start for owner, start in record["matched"] if owner == expert]
    return f"iteration {state.iteration + 1}, segments from epochs {starts} of expert {expert}: "


def _start_again(state: State) -> str:
    return f"the checkpoint holds iteration {state.saved_at}; start again in another folder with a lower"

"""Forgetting and transfer against the textbooks' loops, and the tables that lines of metrics become."""

import math
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

import cddlib
from cddbook.continual import (
    average_forgetting,
    backward_transfer,
    changes_between_visits,
    forward_transfer,
    probe_table,
)
from cddbook.probes import ProbeHook
from cddlib.runtime.run_folder import read_metrics

# --- Forgetting and transfer ------------------------------------------------------------------------------------


@hypothesis.given(data=st.data(), stages=st.integers(1, 7), tasks=st.integers(1, 4))
def test_measures_of_any_visits_against_loops(data: st.DataObject, stages: int, tasks: int) -> None:
    """After GEM and RWalk; where every stage visits the next task, these are their measures."""
    scores = data.draw(hnp.arrays(np.float64, (stages + 1, tasks), elements=st.floats(1, 10)))
    visits = data.draw(hnp.arrays(bool, (stages, tasks)))
    forgetting, backward, forward, changes = [], [], [], []
    for task in range(tasks):
        seen = [stage for stage in range(1, stages + 1) if visits[stage - 1, task]]
        if not seen:
            continue
        if seen[0] != stages:
            forgetting.append(max(scores[stage, task] for stage in range(seen[0], stages)) - scores[stages, task])
        if seen[-1] != stages:
            backward.append(scores[stages, task] - scores[seen[-1], task])
        if seen[0] != 1:
            forward.append(scores[seen[0] - 1, task] - scores[0, task])
        for i in range(len(seen) - 1):
            if seen[i + 1] != seen[i] + 1:
                after, before = scores[seen[i], task], scores[seen[i + 1] - 1, task]
                changes.append((before - after) / after)
    for measure, wanted in (
        (average_forgetting, forgetting),
        (backward_transfer, backward),
        (forward_transfer, forward),
    ):
        mean = sum(wanted) / len(wanted) if wanted else math.nan
        assert measure(scores, visits) == pytest.approx(mean, abs=1e-9, nan_ok=True)
    assert changes_between_visits(scores, visits).tolist() == pytest.approx(changes, abs=1e-9)


# --- Lines of metrics -------------------------------------------------------------------------------------------


def line(expert: int, starts: list[int], losses: list[float] | None = None, **rest: Any) -> dict[str, Any]:
    """A line of metrics, as far as it matters."""
    matched = [[expert, start] for start in starts]
    return {"loss": 0.5, "matched": matched, **({"probe_losses": losses} if losses else {}), **rest}


def test_a_segment_of_another_expert_or_of_a_skipped_iteration_is_no_visit() -> None:
    lines = [{"probe_losses": [1.0, 2.0]}, line(0, [4, 8], [0.9, 1.9]), line(1, [8], [0.9, 1.8])]
    lines.append(line(1, [4], [0.9, 1.8], skipped=True))
    assert probe_table(lines, [4, 8], 1)[1].tolist() == [[False, False], [False, True], [False, False]]
    assert probe_table(lines, [4, 8], 0)[1].tolist() == [[True, True], [False, False], [False, False]]


def test_a_stage_is_what_happens_between_two_measurements() -> None:
    lines = [
        {"probe_losses": [1.0, 2.0]},
        line(0, [4]),
        line(0, [8]),
        line(0, [6], [0.9, 1.9]),
        line(0, [6]),
        line(0, [4], [0.8, 1.8]),
        line(0, [8], [0.7, 1.7]),  # the last iteration is always measured
    ]
    losses, visits = probe_table(lines, [4, 8], 0)
    assert losses.shape == (4, 2)
    assert visits.tolist() == [[True, True], [True, False], [False, True]]


def test_the_table_of_a_real_run(buffer: cddlib.Buffer, quick: dict[str, Any], tmp_path: Path) -> None:
    overrides = {**quick, "segments": 1, "replay": 1, "iterations": 5, "validate_every": 0}
    hook = ProbeHook(probe_starts=(1, 2), probe_every=2, probe_expert=1)
    config = cddlib.distill_recipe("contra", "digits", 1, **overrides)
    cddlib.distill(config, buffer, tmp_path, hooks=[hook], device="cpu")
    lines = read_metrics(tmp_path)
    losses, visits = probe_table(lines, hook.probe_starts, hook.probe_expert)
    assert losses.tolist() == [lines[i]["probe_losses"] for i in (0, 2, 4, 5)]
    stages = [[pair for entry in part for pair in entry["matched"]] for part in (lines[1:3], lines[3:5], lines[5:])]
    assert visits.tolist() == [[[1, start] in stage for start in (1, 2)] for stage in stages]
    assert visits.any()

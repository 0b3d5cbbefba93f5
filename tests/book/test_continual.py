"""Forgetting and transfer against the textbooks' loops, and the tables that a run's metrics become."""

import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from cddbook.continual import average_forgetting, backward_transfer, probe_table


@hypothesis.given(data=st.data(), stages=st.integers(1, 7), tasks=st.integers(1, 4))
def test_measures_of_any_visits_against_loops(data: st.DataObject, stages: int, tasks: int) -> None:
    """After GEM and RWalk; where every stage visits the next task, these are their measures."""
    scores = data.draw(hnp.arrays(np.float64, (stages + 1, tasks), elements=st.floats(1, 10)))
    visits = data.draw(hnp.arrays(bool, (stages, tasks)))
    forgetting, backward = [], []
    for task in range(tasks):
        seen = [stage for stage in range(1, stages + 1) if visits[stage - 1, task]]
        if not seen:
            continue
        if seen[0] != stages:
            forgetting.append(max(scores[stage, task] for stage in range(seen[0], stages)) - scores[stages, task])
        if seen[-1] != stages:
            backward.append(scores[stages, task] - scores[seen[-1], task])
    for measure, wanted in ((average_forgetting, forgetting), (backward_transfer, backward)):
        mean = sum(wanted) / len(wanted) if wanted else math.nan
        assert measure(scores, visits) == pytest.approx(mean, abs=1e-9, nan_ok=True)


def test_a_stage_visits_what_it_matched_on_the_probes_expert_and_did_not_skip() -> None:
    matched = [[(0, 4), (1, 8)], [(1, 6)], [(0, 8)], [(0, 4)], [(0, 8)]]
    losses = [[0, [1.0, 2.0]], [1, [0.9, 1.9]], [3, [0.8, 1.8]], [5, [0.7, 1.7]]]
    metrics = {"matched": matched, "skipped": [[5, True]], "probe_losses": losses}
    found, visits = probe_table(metrics, (4, 8), 0)
    assert found.tolist() == [values for _, values in losses]
    assert visits.tolist() == [[True, False], [False, True], [True, False]]
    assert probe_table(metrics, (4, 8), 1)[1].tolist() == [[False, True], [False, False], [False, False]]
    found, visits = probe_table(metrics, (4, 8), 0, measured={0, 3})
    assert found.tolist() == [[1.0, 2.0], [0.8, 1.8]] and visits.tolist() == [[True, True]]
    assert probe_table(metrics, (4, 8), 0, measured={5})[1].shape == (0, 2)

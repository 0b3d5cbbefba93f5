"""Trajectory matching as continual learning: forgetting and backward transfer.

A *stage* is what happens between two measurements of the probes (one iteration, or `probe_every` of them), a *task* is
a probe, and a stage visits the tasks that it matched. A score is minus a loss: higher is better. Row 0 of a table of
scores is before the first stage, row k after stage k; where every stage visits the next task these are the textbook
measures of GEM and RWalk.
"""

import itertools
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

Scores = Float[np.ndarray, "rows tasks"]
Visits = Bool[np.ndarray, "stages tasks"]


def _visited(visits: Visits) -> list[tuple[int, Sequence[int]]]:
    """Each visited task with the rows right after its visits, ascending."""
    rows = [(task, (np.flatnonzero(visits[:, task]) + 1).tolist()) for task in range(visits.shape[1])]
    return [(task, after) for task, after in rows if after]


def average_forgetting(scores: Scores, visits: Visits) -> float:
    """Mean over tasks of the best score between the first visit and the last stage, minus the last score.

    Positive: what was once learned is lost. Tasks that no stage before the last one visits do not count; nan if none
    does. Source: Chaudhry et al. 2018 (RWalk).
    """
    early = [(task, after[0]) for task, after in _visited(visits) if after[0] < len(scores) - 1]
    return statistics.fmean([scores[first:-1, task].max() - scores[-1, task] for task, first in early] or [math.nan])


def backward_transfer(scores: Scores, visits: Visits) -> float:
    """Mean over tasks of the last score minus the score right after the task's last visit.

    Negative: later stages undid it. Tasks that the last stage visits do not count; nan if no other was visited.
    Source: Lopez-Paz & Ranzato 2017 (GEM).
    """
    left = [(task, after[-1]) for task, after in _visited(visits) if after[-1] < len(scores) - 1]
    return statistics.fmean([scores[-1, task] - scores[last, task] for task, last in left] or [math.nan])


def probe_table(
    metrics: Mapping[str, Sequence[Any]], starts: Sequence[int], expert: int, measured: Collection[int] | None = None
) -> tuple[Scores, Visits]:
    """Losses of the probes and the visits of the stages between, from the metrics of a run's record.

    A probe is visited when its start epoch is matched on its own expert, and the iteration is not skipped. Of the
    measurements only those after the iterations `measured` count, by default all.
    """
    losses = {time: values for time, values in metrics["probe_losses"] if measured is None or time in measured}
    seen = [{start for owner, start in matched if owner == expert} for matched in metrics["matched"]]
    for iteration, _ in metrics.get("skipped", []):
        seen[iteration - 1] = set()
    visits = [[start in set().union(*seen[a:b]) for start in starts] for a, b in itertools.pairwise(losses)]
    return np.array(list(losses.values()), dtype=float), np.array(visits, dtype=bool).reshape(-1, len(starts))

"""From records of studies to numbers with their spread over replicates."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Float

from cddbook import continual, correlation
from cddbook.records import lines_of

Record = Mapping[str, Any]

SETTLED = 3
"""Measurements of the probes that are left out, the one before the first iteration among them. The first steps away
from real images lower every loss far more than all later ones, whichever segment they match."""


# --- Effects ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """A number measured once a replicate: mean, standard deviation, 95 % confidence interval of the mean."""

    mean: float
    std: float
    low: float
    high: float
    count: int


def effect(values: Sequence[float] | np.ndarray | pd.Series) -> Effect:
    """Summarise repeated measurements; a single one, or nan among them, settles nothing."""
    array = np.asarray(values, dtype=float)
    mean, count = float(array.mean()) if len(array) else math.nan, len(array)
    if count < 2:
        return Effect(mean=mean, std=math.nan, low=-math.inf, high=math.inf, count=count)
    std = float(array.std(ddof=1))
    half = float(scipy.stats.t.ppf(0.975, count - 1)) * std / math.sqrt(count)
    return Effect(mean=mean, std=std, low=mean - half, high=mean + half, count=count)


# --- Correlation studies ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correlations:
    """What a correlation study measured, replicate by replicate, after its first `SETTLED` measurements."""

    starts: tuple[int, ...]
    losses: Float[np.ndarray, "replicates matched times measured"]
    controls: dict[str, Float[np.ndarray, "replicates times measured"]]
    similarity: dict[str, list[list[dict[str, Any]]]]

    def pearson(self, *, changes: bool = False) -> Float[np.ndarray, "replicates matched measured"]:
        """Correlation of losses (or of their changes) while the row's segment alone is matched."""
        return correlation.pearson(correlation.changes(self.losses) if changes else self.losses)

    def net_change(self) -> Float[np.ndarray, "replicates matched measured"]:
        """Relative change of a loss while the row's segment alone is matched."""
        return correlation.net_change(self.losses)

    def pearson_in(self, control: str, *, changes: bool = False) -> Float[np.ndarray, "replicates p p"]:
        """Correlation of the probes' losses (or of their changes) within a `sequential` or `concurrent` run."""
        run = np.repeat(self.controls[control][:, None], len(self.starts), axis=1)
        return correlation.pearson(correlation.changes(run) if changes else run)

    def cosines(self, control: str, when: int) -> Float[np.ndarray, "replicates p p"]:
        """Cosines between two students' image gradients at the start (0) or the end (-1) of a control run."""
        return np.stack(
            [correlation.between_draws(np.asarray(g[when]["products"]["images"])) for g in self.similarity[control]]
        )

    def p_values(self, sign: int = -1) -> Float[np.ndarray, "matched measured"]:
        """P-values of "the changes' correlation has not the `sign`" (permutation test, Holm); 1 on the diagonal."""
        ranks = np.stack([correlation.changes(losses) for losses in self.losses])
        return self._corrected(lambda i, j: correlation.permutation_test(ranks[:, i, :, i], -sign * ranks[:, i, :, j]))

    def p_values_of_losses(self, sign: int = -1) -> Float[np.ndarray, "matched measured"]:
        """P-values of "the losses' correlation does not have the `sign`" (t test, Holm); 1 on the diagonal."""
        matrices = -sign * self.pearson()
        return self._corrected(lambda i, j: float(correlation.t_test(matrices[:, i, j])))

    def _corrected(self, p_value: Callable[[int, int], float]) -> Float[np.ndarray, "matched measured"]:
        others = ~np.eye(len(self.starts), dtype=bool)
        corrected = np.ones(others.shape)
        corrected[others] = correlation.holm(np.array([p_value(i, j) for i, j in np.argwhere(others)]))
        return corrected


def correlations(record: Record) -> Correlations:
    """Read the record of a correlation study."""
    starts = tuple(record["config"]["probe_starts"])
    folders = sorted({name.split("/")[0] for name in record["runs"]}, key=lambda name: int(name.split("-")[1]))

    def probed(name: str) -> list[list[float]]:
        losses = [losses for _, losses in record["runs"][name]["metrics"]["probe_losses"]]
        return losses[min(SETTLED, len(losses) - 3) :]  # correlations of changes need two of them

    controls = ("sequential", "concurrent")
    return Correlations(
        starts=starts,
        losses=np.asarray([[probed(f"{folder}/matched-{start:02d}") for start in starts] for folder in folders]),
        controls={control: np.asarray([probed(f"{folder}/{control}") for folder in folders]) for control in controls},
        similarity={
            control: [
                [value for _, value in record["runs"][f"{folder}/{control}"]["metrics"]["gradient_similarity"]]
                for folder in folders
            ]
            for control in controls
        },
    )


# --- Comparisons ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One run of a comparison: its configuration, and what it measured."""

    variant: str
    seed: int
    config: dict[str, Any]
    metrics: dict[str, list[Any]]
    evaluations: list[dict[str, list[float]]]
    result: dict[str, Any]

    @property
    def cost(self) -> int:
        """Segments that an iteration matches."""
        return int(self.config["segments"] + self.config["replay"])

    @property
    def measured(self) -> list[int]:
        """The iterations after which the probes were measured."""
        return [iteration for iteration, _ in self.metrics["probe_losses"]]

    def probes(
        self, measured: Sequence[int] | None = None, skip: int = SETTLED
    ) -> tuple[continual.Scores, continual.Visits]:
        """Losses of the probes after the iterations `measured`, by default all of them, without the first `skip`; and
        the visits of the stages between.
        """
        chosen = set(self.measured if measured is None else measured)
        lines = [
            line if line["iteration"] in chosen else {key: line[key] for key in line.keys() - {"probe_losses"}}
            for line in lines_of(self.metrics)
        ]
        losses, visits = continual.probe_table(lines, self.config["probe_starts"], self.config["probe_expert"])
        first = max(0, min(skip, len(losses) - 2))
        return losses[first:], visits[first:]

    @property
    def last_error(self) -> dict[str, np.ndarray]:
        """The accumulated error of the last iterate, at every segment's end."""
        return {key: np.asarray(values) for key, values in self.metrics["accumulated_error"][-1][1].items()}


def runs_of(record: Record) -> list[ComparedRun]:
    """The runs of a comparison's record."""
    runs = []
    for name, run in record["runs"].items():
        variant, seed = name.split("/seed-")
        measured = {key: run[key] for key in ("metrics", "evaluations", "result")}
        config = {**record["config"], **run["changes"]}
        runs.append(ComparedRun(variant=variant, seed=int(seed), config=config, **measured))
    return runs


def comparison(record: Record) -> pd.DataFrame:
    """A row for each run of a comparison: what it reached, forgot, and took.

    Columns: `variant`, `seed`; `test` and `validation` (at best) accuracy; `error` (accumulated, relative to what the
    expert travelled) and its parts' sums `matching_sum` and `initialisation_sum` likewise, of the last iterate;
    `forgetting`, `backward`, `forward` (in units of the matching loss), `between` (mean relative change between
    visits) and `events` (share of those that are rises); `seconds` an iteration, of the whole run `wall`; `memory`.
    """
    rows = []
    for run in runs_of(record):
        losses, visits = run.probes()
        between = continual.changes_between_visits(losses, visits)
        error = {key: values[-1] for key, values in run.last_error.items()}
        tests = [accuracy for entry in run.evaluations for accuracy in entry["synthetic"]]
        validations = [np.mean(values) for _, values in run.metrics.get("validation_accuracy", [])]
        rows.append(
            {
                "variant": run.variant,
                "seed": run.seed,
                "test": np.mean(tests) if tests else math.nan,
                "validation": max(validations, default=math.nan),
                **{key: error[key] / error["travelled"] for key in ("error", "matching_sum", "initialisation_sum")},
                "forgetting": continual.average_forgetting(-losses, visits),
                "backward": continual.backward_transfer(-losses, visits),
                "forward": continual.forward_transfer(-losses, visits),
                "between": between.mean() if len(between) else math.nan,
                "events": (between > 0).mean() if len(between) else math.nan,
                "seconds": run.result["seconds_per_iteration"],
                "wall": sum(run.metrics["seconds"]),
                "memory": run.result["peak_memory_mb"],
            }
        )
    table = pd.DataFrame(rows)
    table["variant"] = pd.Categorical(table["variant"], table["variant"].unique(), ordered=True)
    return table.sort_values(["variant", "seed"], ignore_index=True)


def curves(record: Record) -> pd.DataFrame:
    """Validation accuracy of every run against iterations, matched segments and seconds of matching."""
    rows = []
    for run in runs_of(record):
        elapsed = np.cumsum([0.0, *run.metrics["seconds"]])
        for iteration, values in run.metrics["validation_accuracy"]:
            row = {"variant": run.variant, "seed": run.seed, "iteration": iteration, "matched": iteration * run.cost}
            rows.append({**row, "elapsed": elapsed[iteration], "accuracy": float(np.mean(values))})
    return pd.DataFrame(rows)


def paired(table: pd.DataFrame, column: str, first: str, second: str) -> Effect:
    """`first` minus `second`, seed by seed."""
    values = {name: table[table["variant"] == name].set_index("seed")[column] for name in (first, second)}
    return effect((values[first] - values[second]).dropna().tolist())


Price = Literal["iteration", "matched"]
"""What two runs have had equally much of: iterations, or matched segments, which is compute."""


def at_equal(price: Price, table: pd.DataFrame, first: str, second: str) -> tuple[int, Effect]:
    """The largest price at which both variants were validated, and `first` minus `second` there, seed by seed.

    Args:
        price: a column of `table`.
        table: from `curves`.
        first: a variant.
        second: another.
    """
    both = [set(table[table["variant"] == name][price]) for name in (first, second)]
    most = max(both[0] & both[1])
    return most, paired(table[table[price] == most], "accuracy", first, second)


def probes_at_equal(price: Price, record: Record, first: str, second: str) -> tuple[int, dict[str, Effect]]:
    """The largest price at which the probes of both variants were measured, and `first` minus `second`, seed by seed:
    the `loss` there, a mean over the probes, and the average `forgetting` on the way.

    Both variants count the measurements at the same prices only: more of them find more forgetting.
    """
    differences: dict[str, list[float]] = {"loss": [], "forgetting": []}
    runs = {(run.variant, run.seed): run for run in runs_of(record)}
    most = 0
    for seed in sorted({seed for variant, seed in runs if variant == first}):
        pair = [runs[first, seed], runs[second, seed]]
        costs = [run.cost if price == "matched" else 1 for run in pair]
        at = [{iteration * cost for iteration in run.measured} for run, cost in zip(pair, costs, strict=True)]
        common = sorted(at[0] & at[1])
        most = common[-1]
        values = []
        for run, cost in zip(pair, costs, strict=True):
            losses, visits = run.probes([place // cost for place in common])
            values.append((float(losses[-1].mean()), continual.average_forgetting(-losses, visits)))
        for key, one, other in zip(differences, *values, strict=True):
            differences[key].append(one - other)
    return most, {
        key: effect([value for value in values if not math.isnan(value)]) for key, values in differences.items()
    }

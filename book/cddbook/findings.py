"""From records of studies to numbers with their spread over replicates."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Float

from cddbook import continual, correlation
from cddbook.study import lines_of

Record = Mapping[str, Any]


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
    mean, count = float(array.mean()), len(array)
    if count < 2:
        return Effect(mean=mean, std=math.nan, low=-math.inf, high=math.inf, count=count)
    std = float(array.std(ddof=1))
    half = float(scipy.stats.t.ppf(0.975, count - 1)) * std / math.sqrt(count)
    return Effect(mean=mean, std=std, low=mean - half, high=mean + half, count=count)


# --- Correlation studies ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correlations:
    """What a correlation study measured, replicate by replicate."""

    starts: tuple[int, ...]
    losses: Float[np.ndarray, "replicates matched times measured"]
    controls: dict[str, Float[np.ndarray, "replicates times measured"]]
    similarity: dict[str, list[list[dict[str, Any]]]]

    def pearson(self, *, changes: bool = False) -> Float[np.ndarray, "replicates matched measured"]:
        """Correlation of losses (or of their changes) while the row's segment alone is matched."""
        return correlation.pearson(correlation.changes(self.losses) if changes else self.losses)

    def net_change(self) -> Float[np.ndarray, "replicates matched measured"]:
        """Relative change of a loss when the row's segment alone has been matched."""
        return correlation.net_change(self.losses)

    def rise(self) -> Float[np.ndarray, "replicates matched measured"]:
        """How far a loss has risen above its lowest value when the row's segment alone has been matched."""
        return correlation.rise(self.losses)

    def pearson_in(self, control: str, *, changes: bool = False) -> Float[np.ndarray, "replicates p p"]:
        """Correlation of the probes' losses (or of their changes) within a `sequential` or `concurrent` run."""
        run = np.repeat(self.controls[control][:, None], len(self.starts), axis=1)
        return correlation.pearson(correlation.changes(run) if changes else run)

    def cosines(self, control: str, when: int) -> Float[np.ndarray, "replicates p p"]:
        """Cosines between two students' image gradients at the start (0) or the end (-1) of a control run."""
        return np.stack(
            [correlation.between_draws(np.asarray(g[when]["products"]["images"])) for g in self.similarity[control]]
        )

    def p_values(self) -> Float[np.ndarray, "matched measured"]:
        """P-values of "the changes' correlation is not negative" (permutation test, Holm); 1 on the diagonal."""
        ranks = np.stack([correlation.changes(losses) for losses in self.losses])
        return self._corrected(lambda i, j: correlation.permutation_test(ranks[:, i, :, i], ranks[:, i, :, j]))

    def p_values_of_losses(self) -> Float[np.ndarray, "matched measured"]:
        """P-values of "the losses' correlation is not negative" (t over replicates, Holm); 1 on the diagonal."""
        matrices = self.pearson()
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
        return [losses for _, losses in record["runs"][name]["metrics"]["probe_losses"]]

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
    def probes(self) -> tuple[continual.Scores, continual.Visits]:
        """Losses of the probes, and the visits of the stages between."""
        lines = lines_of(self.metrics)
        return continual.probe_table(lines, self.config["probe_starts"], self.config["probe_expert"])

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
        losses, visits = run.probes
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


def at_equal_iterations(table: pd.DataFrame, first: str, second: str) -> tuple[int, Effect]:
    """The last iteration at which both variants were validated, and `first` minus `second` there, seed by seed."""
    both = [set(table[table["variant"] == name]["iteration"]) for name in (first, second)]
    iteration = max(both[0] & both[1])
    return iteration, paired(table[table["iteration"] == iteration], "accuracy", first, second)

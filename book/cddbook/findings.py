"""From records of studies to numbers with their spread over replicates."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Float

from cddbook import continual, correlation
from cddlib.evaluate import SETS

Record = Mapping[str, Any]

SETTLED = 3
"""Measurements of the probes that are left out, the one before the first iteration among them. The first steps away
from real images can change every loss at once, whichever segment they match."""

SMOOTH = 5
"""Successive measurements that are averaged before forgetting is read. The best of many single ones is partly luck, the
more so the more a loss fluctuates; and it fluctuates less where one step serves many segments."""


@dataclasses.dataclass(frozen=True)
class Effect:
    """A number measured once a replicate: mean, 95 % confidence interval of the mean, and how many replicates."""

    mean: float
    low: float
    high: float
    count: int

    def shown(self, scale: float, digits: int, unit: str = "") -> str:
        """`scale` times mean and interval; one measurement has no interval, and one of no width measures no spread."""
        mean, low, high = (f"{scale * value:+.{digits}f}" for value in (self.mean, self.low, self.high))
        spread = ", the same in all" if self.high - self.low <= 1e-9 else f" [{low}, {high}]"
        return mean + unit + spread * (self.count > 1)


def effect(values: Sequence[float] | np.ndarray | pd.Series) -> Effect:
    """Summarise repeated measurements; a single one, or nan among them, leaves the interval open."""
    array = np.asarray(values, dtype=float)
    mean, half = float(array.mean()) if len(array) else math.nan, math.inf
    if len(array) > 1:
        half = float(scipy.stats.t.ppf(0.975, len(array) - 1) * scipy.stats.sem(array))
    return Effect(mean, mean - half, mean + half, len(array))


CONTROLS = ("sequential", "concurrent")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correlations:
    """What a correlation study measured, replicate by replicate, without its first measurements.

    A kind of run is `matched` (the row's segment alone is matched), `sequential` or `concurrent` (all rows are of one
    run).
    """

    ipc: int
    starts: tuple[int, ...]
    epochs: int
    """Length M of a segment."""
    losses: dict[str, Float[np.ndarray, "replicates matched times measured"]]
    similarity: dict[str, list[list[dict[str, Any]]]]

    @property
    def below(self) -> correlation.Pairs:
        """The pairs below the diagonal whose segments share no epoch."""
        return np.subtract.outer(self.starts, self.starts) >= self.epochs

    def pearson(self, kind: str = "matched") -> correlation.Matrices:
        """Correlation of losses within runs of a kind."""
        return correlation.pearson(self.losses[kind])

    def net_change(self) -> correlation.Matrices:
        """By how much a loss has changed in the end, relative to its start; above 0, matching the row's one hurt it."""
        losses = self.losses["matched"]
        return losses[:, :, -1] / losses[:, :, 0] - 1

    def cosines(self, kind: str, when: int, variable: str = "images") -> correlation.Matrices:
        """Cosines between two students' gradients at the start (0) or the end (-1) of a run of a kind."""
        products = [np.asarray(found[when]["products"][variable]) for found in self.similarity[kind]]
        return np.stack([correlation.between_draws(product) for product in products])

    def p_values(self, sign: int = -1) -> correlation.Matrix:
        """P-values of "the losses' correlation does not have the `sign`" (t test, Holm); 1 on the diagonal."""
        pairs = -sign * correlation.off_diagonal(self.pearson())
        return correlation.holm(scipy.stats.ttest_1samp(pairs, 0, alternative="less").pvalue)


def correlations(record: Record, skip: int = SETTLED) -> Correlations:
    """Read the record of a correlation study, without the first `skip` measurements of the losses."""
    config, runs = record["config"], record["runs"]
    starts = tuple(config["probe_starts"])
    folders = sorted({name.split("/")[0] for name in runs}, key=lambda name: int(name.split("-")[1]))

    def measured(name: str, metric: str) -> list[list[Any]]:
        return [[value for _, value in runs[f"{folder}/{name}"]["metrics"][metric]] for folder in folders]

    rows = {"matched": [f"matched-{start:02d}" for start in starts]} | {kind: [kind] * len(starts) for kind in CONTROLS}
    losses = {kind: np.stack([measured(name, "probe_losses") for name in names], 1) for kind, names in rows.items()}
    losses = {kind: found[:, :, min(skip, found.shape[2] - 3) :] for kind, found in losses.items()}  # two changes
    similarity = {kind: measured(kind, "gradient_similarity") for kind in CONTROLS}
    settings = {"ipc": config["ipc"], "starts": starts, "epochs": config["expert_epochs"]}
    return Correlations(**settings, losses=losses, similarity=similarity)


class ComparedRun(NamedTuple):
    """One run of a comparison: its configuration, and what it measured."""

    variant: str
    seed: int
    config: dict[str, Any]
    metrics: dict[str, list[Any]]
    evaluations: dict[str, dict[str, Any]]
    """By the architecture of the networks that were tested."""
    result: dict[str, Any]

    @property
    def own(self) -> dict[str, Any]:
        """The accuracies of networks like the one that the set was distilled with."""
        return self.evaluations.get(self.config["network"], {})

    @property
    def cost(self) -> int:
        """Segments that an iteration matches."""
        return int(self.config["segments"] + self.config["replay"])

    def probes(
        self, measured: Collection[int] | None = None, skip: int = SETTLED
    ) -> tuple[continual.Scores, continual.Visits]:
        """`continual.probe_table` of the run, without the first `skip` measurements."""
        whose = self.config["probe_starts"], self.config["probe_expert"]
        losses, visits = continual.probe_table(self.metrics, *whose, measured)
        first = max(0, min(skip, len(losses) - 2))
        return losses[first:], visits[first:]


def runs_of(record: Record) -> list[ComparedRun]:
    """The runs of a comparison's record."""
    runs = []
    for name, run in record["runs"].items():
        variant, seed = name.split("/seed-")
        known = {"network": "convnet", "buffer_id": record.get("buffer_id")}  # once there was no other network
        config = {**known, **record["config"], **run["changes"]}
        tested = {entry.get("network", config["network"]): entry for entry in run["evaluations"]}
        runs.append(ComparedRun(variant, int(seed), config, run["metrics"], tested, run["result"]))
    return runs


def comparison(record: Record) -> pd.DataFrame:
    """A row for each run of a comparison: what it reached, forgot, and took.

    Columns: `variant`, `seed`; `test` accuracy; `error` of the last iterate, see `_error`; `forgetting` and `backward`
    transfer, in units of the matching loss; whether the set before the first iteration was the best, `undistilled`.
    """
    rows = []
    for run in runs_of(record):
        losses, visits = run.probes()
        row: dict[str, Any] = {"variant": run.variant, "seed": run.seed}
        row["test"] = np.mean(run.own["synthetic"]) if run.own else math.nan
        row["error"] = _error(run.metrics["accumulated_error"][-1][1], run.config)
        row |= {"forgetting": _forgetting(losses, visits), "backward": continual.backward_transfer(-losses, visits)}
        rows.append({**row, "undistilled": run.result["selected_iteration"] == 0})
    table = pd.DataFrame(rows)
    table["variant"] = pd.Categorical(table["variant"], table["variant"].unique(), ordered=True)
    return table.sort_values(["variant", "seed"], ignore_index=True)


def _error(measured: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """What accumulates up to the end of the last segment in the window, relative to the expert's way; nan of one."""
    last = sum(end <= config["window_end"] - 1 + config["expert_epochs"] for end in measured["epoch"]) - 1
    return measured["error"][last] / measured["travelled"][last] if last > 0 else math.nan


def _forgetting(losses: Float[np.ndarray, "times probes"], visits: continual.Visits) -> float:
    """Average forgetting by means of `SMOOTH` successive measurements, or fewer where there are not twice as many."""
    width = max(1, min(SMOOTH, len(losses) // 2))
    means = np.lib.stride_tricks.sliding_window_view(losses, width, axis=0).mean(axis=-1)
    return continual.average_forgetting(-means, visits[: len(means) - 1])


def baselines(record: Record) -> dict[str, list[float]]:
    """The test accuracies of networks that a comparison trained on other images than a synthetic set's, by which."""
    found = {name: [a for run in runs_of(record) for a in run.own.get(key, [])] for key, name in SETS.items()}
    return {name: accuracies for name, accuracies in found.items() if accuracies and name != SETS["synthetic"]}


def by_class(record: Record) -> dict[str, pd.DataFrame]:
    """By class, a row a run: the fraction of its test images that networks trained on the set recognise, `test`."""
    tested = [(run, run.own["by_class"]) for run in runs_of(record)]
    return {name: tests_of((run, fractions[name]) for run, fractions in tested) for name in tested[0][1]}


def transfers(record: Record) -> dict[str, pd.DataFrame]:
    """By other architecture of networks that were trained on the sets, a row a run: their mean accuracy, `test`."""
    tested = [(run, name, found["synthetic"]) for run in runs_of(record) for name, found in run.evaluations.items()]
    others = dict.fromkeys(name for run, name, _ in tested if name != run.config["network"])
    return {other: tests_of((run, values) for run, name, values in tested if name == other) for other in others}


def tests_of(found: Iterable[tuple[ComparedRun, Sequence[float]]]) -> pd.DataFrame:
    """A row a run: the mean of some accuracies, `test`."""
    return pd.DataFrame({"variant": run.variant, "seed": run.seed, "test": np.mean(values)} for run, values in found)


def curves(record: Record) -> pd.DataFrame:
    """A row an iteration of every run of a comparison, from the start on.

    Columns: `variant`, `seed`, `iteration`; `matched` segments and `elapsed` seconds of matching until then; `loss`;
    and, where they were measured, `accuracy` on the validation images and accumulated `error` over the expert's way.
    """
    tables = []
    for run in runs_of(record):
        table = pd.DataFrame({"loss": [math.nan, *run.metrics["loss"]]}).rename_axis("iteration")
        table["elapsed"] = np.cumsum([0.0, *run.metrics["seconds"]])
        table["accuracy"] = pd.Series({i: np.mean(values) for i, values in run.metrics.get("validation_accuracy", [])})
        table["error"] = pd.Series({i: _error(value, run.config) for i, value in run.metrics["accumulated_error"]})
        tables.append(table.assign(variant=run.variant, seed=run.seed, matched=table.index * run.cost).reset_index())
    return pd.concat(tables, ignore_index=True)


def paired(table: pd.DataFrame, column: str, first: str, second: str) -> Effect:
    """`first` minus `second`, seed by seed."""
    values = table.pivot(index="seed", columns="variant", values=column)
    return effect((values[first] - values[second]).dropna())


PRICES = {"matched": "after {} matched segments", "iteration": "after {} iterations"}
"""At what runs can be compared; equal numbers of matched segments are equal compute."""


def at_equal(curve: pd.DataFrame, value: str) -> dict[str, pd.DataFrame]:
    """By each price, in words: the rows of `curves` at the largest one at which `value` was measured in all runs."""
    found, measured = {}, curve.dropna(subset=value)
    for price, words in PRICES.items():
        prices = measured.groupby(["variant", "seed"])[price].agg(set)
        most = max(set.intersection(*prices), default=0) if len(prices) else 0
        if most:
            found[words.format(most)] = measured[measured[price] == most]
    return found


def probes_at_equal(record: Record, variants: Sequence[str]) -> dict[str, pd.DataFrame]:
    """By price in words, the largest at which the probes of all these variants' runs were measured: a row a run, with
    the `mean loss of the probes` there and the `average forgetting` on the way.

    All count as many measurements, because more of them find more forgetting: those nearest to the ones of the run that
    was measured least often.
    """
    found = {}
    for price in ("matched", "iteration"):
        runs = [(r, r.cost if price == "matched" else 1) for r in runs_of(record) if r.variant in variants]
        own = [[time * cost for time, _ in run.metrics["probe_losses"]] for run, cost in runs]
        most = max(set.intersection(*map(set, own)))
        least = min(([time for time in times if time <= most] for times in own), key=len)
        rows = []
        for (run, cost), times in zip(runs, own, strict=True):
            losses, visits = run.probes({min(times, key=lambda t: abs(t - other)) // cost for other in least})
            row = {"variant": run.variant, "seed": run.seed, "mean loss of the probes": losses[-1].mean()}
            rows.append({**row, "average forgetting": _forgetting(losses, visits)})
        found[PRICES[price].format(most)] = pd.DataFrame(rows)
    return found


def gpu_runs(distil: Record, evaluated: Record, at: Mapping[int, int] | None = None) -> list[ComparedRun]:
    """The runs that `make gpu` recorded, with tests of the last set, or of the one after an iteration, `at`, by K."""
    tests = {(row["segments"], row["seed"], row["iteration"]): row["accuracies"] for row in evaluated["rows"]}
    runs = []
    for run in distil["runs"]:
        k, seed = run["segments"], run["seed"]
        reached = (at or {}).get(k, run["iterations"])
        config = {**run["config"], "iterations": reached}
        tested = {config["network"]: {"synthetic": tests[k, seed, reached]}}
        result = {"seconds": sum(run["seconds"]), "device": distil["device"]}
        runs.append(ComparedRun(f"K={k}", seed, config, {}, tested, result))
    return runs

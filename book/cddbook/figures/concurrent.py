"""Figures and tables of chapters 5 and 6: segment counts and accuracies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cddbook.figures.style import MARKERS, _as_percent
from cddlib.runtime.run_folder import read_metrics


def read_runs(folders: Mapping[tuple[int, int], Path]) -> pd.DataFrame:
    """Metrics of runs keyed by (segments, seed): a row an iteration, with the segments matched until then."""
    tables = []
    for (segments, seed), folder in folders.items():
        table = pd.DataFrame(read_metrics(folder))
        table["segments"], table["seed"] = segments, seed
        table["variant"] = f"K = {segments}"
        table["matched"] = table["iteration"] * segments
        table["elapsed"] = table["seconds"].fillna(0).cumsum()
        accuracy = table["validation_accuracy"]
        table["accuracy"] = accuracy.map(lambda values: np.mean(values) if isinstance(values, list) else np.nan)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def accuracy_curves(table: pd.DataFrame) -> Figure:
    """Validation accuracy against iterations, matched segments and seconds of matching; mean ± sd over seeds.

    Args:
        table: from `read_runs` or `findings.curves`; seconds are averaged over seeds.
    """
    measured = table.dropna(subset="accuracy")
    labels = {"iteration": "iterations", "matched": "segments matched = K · iterations", "elapsed": "seconds matching"}
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.5), sharey=True)
    for axis, (x, label) in zip(axes, labels.items(), strict=True):
        for (variant, mine), marker in zip(measured.groupby("variant", sort=False), MARKERS, strict=False):
            points = mine.groupby("iteration").agg(x=(x, "mean"), mean=("accuracy", "mean"), sd=("accuracy", "std"))
            spread = points["sd"].fillna(0)
            axis.plot(points["x"], points["mean"], marker=marker, markersize=4, label=variant)
            axis.fill_between(points["x"], points["mean"] - spread, points["mean"] + spread, alpha=0.2)
        axis.set(xlabel=label)
    axes[0].set_ylabel("validation accuracy")
    axes[-1].legend(fontsize=8)
    _as_percent(axes[0])
    return figure


def loss_by_segments(runs: pd.DataFrame) -> Figure:
    """Matching loss (mean over the K segments) against iterations, smoothed over five; mean ± sd over seeds."""
    table = runs.dropna(subset="loss").rename(columns={"segments": "K"})
    table["loss"] = table.groupby(["K", "seed"])["loss"].transform(lambda loss: loss.rolling(5, min_periods=1).mean())
    figure, axis = plt.subplots()
    sns.lineplot(table, x="iteration", y="loss", hue="K", style="K", palette="colorblind", errorbar="sd")
    axis.set(ylabel="matching loss")
    return figure


def accuracy_table(runs: pd.DataFrame) -> str:
    """Markdown of validation accuracy for each K: at equal iterations, and at equal compute, with paired differences.

    Equal compute takes, for each K, its last validated iterate within the matched segments that the smallest K spent.
    """
    measured = runs.dropna(subset="accuracy")
    last, budget = measured["iteration"].max(), measured.groupby("segments")["matched"].max().min()
    lines = [
        f"Validation accuracy, mean ± standard deviation over {runs['seed'].nunique()} seeds; in brackets, segments "
        "matched until then; below it, the difference to the smallest K with the same seed; median seconds an "
        "iteration on this machine.",
        "",
        f"| K | after {last} iterations | after at most {budget} matched segments | seconds |",
        "|---|---|---|---|",
    ]
    reference: list[pd.Series] = []
    for segments, mine in measured.groupby("segments"):
        within = mine[(mine["matched"] <= budget) & (mine["iteration"] > 0)]
        ends = [part[part["iteration"] == part["iteration"].max()].set_index("seed") for part in (mine, within)]
        reference = reference or [end["accuracy"] for end in ends]
        cells = [_accuracy_cell(end, first) for end, first in zip(ends, reference, strict=True)]
        seconds = runs[runs["segments"] == segments]["seconds"].median()
        lines.append(f"| {segments} | {cells[0]} | {cells[1]} | {seconds:.3f} |")
    return "\n".join(lines)


def _accuracy_cell(end: pd.DataFrame, reference: pd.Series) -> str:
    """Mean ± sd of the last accuracies, the segments matched for them, and the paired difference to `reference`."""
    if end.empty:
        return "not validated that early"
    difference = 100 * (end["accuracy"] - reference)
    cell = f"{end['accuracy'].mean():.1%} ± {end['accuracy'].std():.1%} ({end['matched'].iloc[0]})"
    return cell if not difference.any() else f"{cell}<br>{difference.mean():+.1f} ± {difference.std():.1f} points"


def accuracy_bars(accuracies: Mapping[str, Sequence[float]]) -> Figure:
    """Test accuracy of networks trained on each set: mean, standard deviation, and every network as a dot."""
    table = pd.DataFrame([{"set": name, "accuracy": a} for name, values in accuracies.items() for a in values])
    figure, axis = plt.subplots()
    sns.barplot(table, x="accuracy", y="set", errorbar="sd", capsize=0.2, color="C0", alpha=0.6)
    sns.stripplot(table, x="accuracy", y="set", color="0.2", size=4)
    axis.set(xlabel="test accuracy", ylabel=None, xlim=(0, 1))
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def accuracies_by_set(evaluations: Mapping[int, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Test accuracies by name, from evaluation records keyed by K; the first one has the baselines."""
    accuracies = {f"distilled, K = {k}": record["accuracies"]["synthetic"] for k, record in evaluations.items()}
    baselines = next(iter(evaluations.values()))["accuracies"]
    return {
        **accuracies,
        "random real images": baselines["random_real"],
        "all training images": baselines["full"],
    }


def accuracies_in_words(accuracies: Mapping[str, Sequence[float]]) -> str:
    """The numbers behind `accuracy_bars`."""
    parts = [
        f"{name} {100 * np.mean(values):.1f}" + (f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else "")
        for name, values in accuracies.items()
    ]
    networks = {len(values) for values in accuracies.values()}
    counted = " or ".join(str(count) for count in sorted(networks))
    return f"Test accuracy in percent, mean ± standard deviation over {counted} networks: " + "; ".join(parts) + "."


def run_table(records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """What distillation runs cost and reached, a column each, from their records."""
    columns = {}
    for name, record in records.items():
        losses = [line["loss"] for line in record["metrics"] if "loss" in line]
        columns[name] = {
            "iterations": record["config"]["iterations"],
            "seconds an iteration (median)": f"{record['result']['seconds_per_iteration']:.1f}",
            "whole run, minutes": f"{record['result']['seconds'] / 60:.1f}",
            "peak memory of the process, MB": f"{record['result']['peak_memory_mb']:.0f}",
            "matching loss, first 10 iterations": f"{np.mean(losses[:10]):.3f}",
            "matching loss, last 10 iterations": f"{np.mean(losses[-10:]):.3f}",
            "step size, last": f"{record['metrics'][-1]['step_size']:.4f}",
            "iteration selected by validation": record["result"]["selected_iteration"],
        }
    return pd.DataFrame(columns)

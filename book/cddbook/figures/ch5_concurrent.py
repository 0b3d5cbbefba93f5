"""Figures of chapter 5, which chapters 4 and 6 also use: segment counts and accuracies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from cddbook.figures.style import MARKERS, PERCENT, band
from cddbook.tables import markdown, mean_sd
from cddlib.runtime.run_folder import read_metrics


def read_runs(folders: Mapping[tuple[int, int], Path]) -> pd.DataFrame:
    """Metrics of runs keyed by (segments, seed): a row an iteration, with the segments matched until then."""
    tables = [
        pd.DataFrame(read_metrics(folder)).assign(segments=segments, seed=seed, variant=f"K = {segments}")
        for (segments, seed), folder in folders.items()
    ]
    table = pd.concat(tables, ignore_index=True)
    table["matched"] = table["iteration"] * table["segments"]
    table["elapsed"] = table["seconds"].fillna(0).groupby([table["segments"], table["seed"]]).cumsum()
    table["accuracy"] = table["validation_accuracy"].map(np.mean, na_action="ignore")
    return table


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
            by_seed = mine.pivot(index="seed", columns="iteration", values="accuracy")
            band(axis, mine.groupby("iteration")[x].mean(), by_seed, marker=marker, markersize=4, label=variant)
        axis.set(xlabel=label)
    axes[0].set_ylabel("validation accuracy")
    axes[-1].legend(fontsize=8)
    axes[0].yaxis.set_major_formatter(PERCENT)
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
    allowed = {f"after {last} iterations": measured}
    allowed[f"after at most {budget} matched segments"] = measured.query("matched <= @budget and iteration > 0")
    rows, reference = [], dict[str, pd.Series]()
    for segments, mine in runs.groupby("segments"):
        row = {"K": str(segments)}
        for title, part in allowed.items():
            part = part[part["segments"] == segments]
            end = part[part["iteration"] == part["iteration"].max()].set_index("seed")
            row[title] = _accuracy_cell(end, reference.setdefault(title, end["accuracy"]))
        rows.append({**row, "seconds": f"{mine['seconds'].median():.3f}"})
    return (
        f"Validation accuracy, mean ± standard deviation over {runs['seed'].nunique()} seeds; in brackets, segments "
        "matched until then; below it, the difference to the smallest K with the same seed; median seconds an "
        f"iteration on this machine.\n\n{markdown(rows)}"
    )


def _accuracy_cell(end: pd.DataFrame, reference: pd.Series) -> str:
    """Mean ± sd of the last accuracies, the segments matched for them, and the paired difference to `reference`."""
    if end.empty:
        return "not validated that early"
    difference = 100 * (end["accuracy"] - reference)
    cell = f"{end['accuracy'].mean():.1%} ± {end['accuracy'].std():.1%} ({end['matched'].iloc[0]})"
    return f"{cell}<br>{difference.mean():+.1f} ± {difference.std():.1f} points" if difference.any() else cell


def accuracy_bars(accuracies: Mapping[str, Sequence[float]]) -> Figure:
    """Test accuracy of networks trained on each set: mean, standard deviation, and every network as a dot."""
    table = pd.DataFrame([{"set": name, "accuracy": a} for name, values in accuracies.items() for a in values])
    figure, axis = plt.subplots()
    sns.barplot(table, x="accuracy", y="set", errorbar="sd", capsize=0.2, color="C0", alpha=0.6)
    sns.stripplot(table, x="accuracy", y="set", color="0.2", size=4)
    axis.set(xlabel="test accuracy", ylabel=None, xlim=(0, 1))
    axis.xaxis.set_major_formatter(PERCENT)
    return figure


def accuracies_by_set(evaluations: Mapping[int, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Test accuracies by name, from evaluation records keyed by K; the first one has the baselines."""
    accuracies = {f"distilled, K = {k}": record["accuracies"]["synthetic"] for k, record in evaluations.items()}
    baselines = next(iter(evaluations.values()))["accuracies"]
    return {**accuracies, "random real images": baselines["random_real"], "all training images": baselines["full"]}


def accuracies_in_words(accuracies: Mapping[str, Sequence[float]]) -> str:
    """The numbers behind `accuracy_bars`."""
    parts = [f"{name} {mean_sd(values, scale=100.0)}" for name, values in accuracies.items()]
    counts = " or ".join(str(count) for count in sorted({len(values) for values in accuracies.values()}))
    return f"Test accuracy in percent, mean ± standard deviation over {counts} networks: " + "; ".join(parts) + "."

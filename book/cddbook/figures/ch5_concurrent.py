"""What chapters 4 to 6 show of variants that are compared, usually different K: figures, a table, and a caption."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from cddbook.figures.style import PERCENT, lines
from cddbook.findings import Record, runs_of
from cddlib.runtime.files import read_json
from cddlib.runtime.run_folder import read_metrics

AGAINST = {"iteration": "iterations", "matched": "segments matched", "elapsed": "seconds of matching"}
VALUES = {"loss": "matching loss", "accuracy": "validation accuracy", "error": "ε / way of the expert"}


def curves(table: pd.DataFrame, value: str, levels: Mapping[str, Sequence[float]] | None = None) -> Figure:
    """A value against iterations, matched segments and seconds, which are means over seeds.

    The means of `levels`, which are accuracies by name, are dotted lines.
    """
    table = table.dropna(subset=value)
    means = table.groupby(["variant", "iteration"])[list(AGAINST)].transform("mean").rename(columns=AGAINST)
    means[["variant", VALUES[value]]] = table[["variant", value]]
    figure = lines(means.melt(["variant", VALUES[value]], value_name=" "), " ", VALUES[value], panel="variable")
    for axis, (name, level) in itertools.product(figure.axes, (levels or {}).items()):
        axis.axhline(mean := float(np.mean(level)), color="0.4", linestyle=":")
        axis.annotate(name, (0.98, mean), xycoords=axis.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
    return figure


def accuracy_bars(table: pd.DataFrame) -> Figure:
    """The column `test` by `variant`: mean, standard deviation, and every value as a dot."""
    figure, axis = plt.subplots()
    sns.barplot(table, x="test", y="variant", errorbar="sd", capsize=0.2, color="C0", alpha=0.6)
    sns.stripplot(table, x="test", y="variant", color="0.2", size=4)
    axis.set(xlabel="test accuracy", ylabel=None, xlim=(0, 1))
    axis.xaxis.set_major_formatter(PERCENT)
    return figure


def probe_losses(record: Record) -> Figure:
    """Losses of the probes against matched segments, a panel a variant; mean ± sd over seeds; visits of one seed."""
    x, y, hue, tables = "segments matched", "matching loss of the probe", "start epoch", []
    for run in runs_of(record):
        losses, visits = run.probes(skip=0)
        measured = [run.cost * iteration for iteration, _ in run.metrics["probe_losses"]]
        rows = pd.MultiIndex.from_product([measured, run.config["probe_starts"]], names=[x, hue])
        table = pd.DataFrame({y: losses.flat, "visited": np.pad(visits, ((1, 0), (0, 0))).flat}, rows).reset_index()
        tables.append(table.assign(variant=run.variant, seed=run.seed))
    table = pd.concat(tables, ignore_index=True)
    figure = lines(table, x, y, hue=hue, panel="variant", palette="viridis")
    ticks = table[table["seed"] == table["seed"].min()]
    ticks = ticks.assign(**{y: ticks[y].where(ticks["visited"])})  # of rows without a tick, only the colour counts
    for axis, (_, mine) in zip(figure.axes, ticks.groupby("variant", sort=False), strict=True):
        sns.scatterplot(mine, x=x, y=y, hue=hue, palette="viridis", marker="|", legend=False, ax=axis, linewidth=1)
    return figure


def error_along(record: Record) -> Figure:
    """Accumulated error along the trajectory, and the sums of its two parts; mean ± sd over seeds, last iterate."""
    keys = {"error": "ε, accumulated", "matching_sum": "Σδ, matching", "initialisation_sum": "ΣI, initialisation"}
    x, y = "expert epoch", "length / way of the expert"
    last = [(run.variant, run.metrics["accumulated_error"][-1][1]) for run in runs_of(record)]
    table = pd.concat([pd.DataFrame(error).assign(variant=variant) for variant, error in last], ignore_index=True)
    parts = table[list(keys)].rename(columns=keys).div(table["travelled"], axis=0)
    parts[[x, "variant"]] = table[["epoch", "variant"]]
    figure = lines(parts.melt([x, "variant"], value_name=y), x, y, panel="variable")
    figure.axes[0].set_ylim(bottom=0)
    return figure


def selection_sentence(segments: int, run: Path) -> str:
    """Which set of a run validation selected, and how accurate the first and this one are."""
    result, first = read_json(run / "result.json"), statistics.fmean(read_metrics(run)[0]["validation_accuracy"])
    images = f"the distilled images of iteration {result['selected_iteration']}"
    if result["selected_iteration"] == 0:
        images = "no iteration was better than the start, so these are its random real images"
    accuracies = f"{first:.1%} at the start, {result['validation_accuracy']:.1%} with these"
    return f"K = {segments}: {images}; validation accuracy {accuracies}."

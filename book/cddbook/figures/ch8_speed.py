"""Figures of chapter 8: what `make bench` and tests/benchmarks/precision.py recorded on a CPU."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from cddbook.tables import markdown

TEXTBOOK = "textbook"
"""How the names of all implementations begin that cddlib is compared with."""
APART = ("one by one", "side by side")
"""How the names of implementations end that differ in how many segments they match at a time."""
SMALL_SIDE = 8
"""Pixels of the images with which steps are small."""
COLUMNS = ("curve", "seconds", "peak_memory_mb", "start_memory_mb", "rate", "convolution_rate", "left_out")


def measurements(record: Mapping[str, Any]) -> pd.DataFrame:
    """A row a measurement of `make bench`; of what was left out, seconds and memory are nan.

    `memory_mb` is how far the process grew beyond what it held before the work; `curve` is empty outside the curves.
    """
    table = pd.DataFrame(record["measurements"])
    table = table.reindex(columns=table.columns.union(COLUMNS, sort=False))
    table["curve"] = table["curve"].astype(object).fillna("")
    return table.assign(memory_mb=table["peak_memory_mb"] - table["start_memory_mb"])


def part(table: pd.DataFrame, *, apart: bool) -> pd.DataFrame:
    """Outside the curves, what compares segments side by side with segments one by one; or all else."""
    own = table["implementation"].str.endswith(APART)
    beside = table["name"].isin(table["name"][own]) & table["implementation"].str.startswith(TEXTBOOK)
    return table[(table["curve"] == "") & (own | beside if apart else ~own & (table["side"] != SMALL_SIDE))]


def bars(table: pd.DataFrame, column: str, xlabel: str) -> Figure:
    """Bars of seconds or of memory, on a logarithmic axis; what was left out has its reason in place of a bar."""
    names, implementations = table["name"].unique(), table["implementation"].unique()
    figure, axis = plt.subplots(figsize=(6.4, 0.8 + 0.6 * len(names)))
    shown = table.pivot(index="name", columns="implementation").reindex(names)
    shown[column][implementations].plot.barh(ax=axis, width=0.8)
    for implementation, bars in zip(implementations, axis.containers, strict=True):
        for bar, reason in zip(bars, shown["left_out"][implementation], strict=True):
            if isinstance(reason, str):
                place = bar.get_y() + bar.get_height() / 2
                axis.text(0.01, place, reason, transform=axis.get_yaxis_transform(), va="center", fontsize=6)
    axis.autoscale(axis="y")
    axis.margins(y=0.01)
    axis.invert_yaxis()
    lowest = 10 ** np.floor(np.log10(table[column].min()))
    axis.set(xscale="log", xlabel=xlabel, ylabel="", xlim=(lowest, None))
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8)
    return figure


def ratio_table(table: pd.DataFrame, column: str) -> str:
    """How each of cddlib's ways compares with the faster of the textbook's; a Markdown table.

    Args:
        table: from `part`.
        column: `seconds`, of which the ratio says how many times as fast; or `memory_mb`, of which it is the fraction.
    """
    ways = [way for way in table["implementation"].unique() if not way.startswith(TEXTBOOK)]
    shown = "{:.3g} s" if column == "seconds" else "{:,.0f} MB"
    rows = []
    for name, mine in table.groupby("name", sort=False):
        theirs = mine[mine["implementation"].str.startswith(TEXTBOOK)]
        best = theirs.loc[theirs["seconds"].idxmin(), column] if theirs["seconds"].notna().any() else np.nan
        row = {"work": name, TEXTBOOK: theirs["left_out"].iloc[0] if np.isnan(best) else shown.format(best)}
        for own in mine[mine["implementation"].isin(ways)].to_dict("records"):
            ratio = best / own[column] if column == "seconds" else own[column] / best
            said = shown.format(own[column]) + ("" if np.isnan(ratio) else f", {ratio:.2f}")
            row[own["implementation"]] = own["left_out"] if np.isnan(own["seconds"]) else said
        rows.append(row)
    return markdown(pd.DataFrame(rows, columns=["work", TEXTBOOK, *ways]))


def rate_of(table: pd.DataFrame, implementation: str) -> pd.Series:
    """By the work's name, its rate as a fraction of the convolution's."""
    rows = table[table["implementation"] == implementation].dropna(subset="rate").set_index("name")
    return rows["rate"] / rows["convolution_rate"]


def law(table: pd.DataFrame, implementation: str) -> tuple[float, float, float]:
    """Seconds = a + b operations, fitted to the curves in relative error; a, b, and the largest relative error."""
    rows = table[(table["curve"] != "") & (table["implementation"] == implementation)].dropna(subset="seconds")
    seconds, operations = rows["seconds"].astype(float), rows["operations"].astype(float)
    b, a = np.polyfit(operations, seconds, deg=1, w=1 / seconds)
    return float(a), float(b), float(((a + b * operations) / seconds - 1).abs().max())


def curves(table: pd.DataFrame, varied: Mapping[str, str]) -> Figure:
    """Seconds, with the law, and memory of an iteration, against one thing at a time.

    Args:
        table: from `measurements`.
        varied: for each curve, the column that varies.
    """
    figure, axes = plt.subplots(2, len(varied), figsize=(9, 4.6), sharey="row", layout="constrained")
    for (curve, column), (upper, lower) in zip(varied.items(), axes.T, strict=True):
        for way, rows in table[table["curve"] == curve].groupby("implementation", sort=False):
            upper.plot(rows[column], rows["seconds"], "o", label=way, markersize=4)
            lower.plot(rows[column], rows["memory_mb"], "o-", label=way, markersize=4)
            a, b, _ = law(table, str(way))
            upper.plot(rows[column], a + b * rows["operations"], "-", color=upper.lines[-1].get_color(), linewidth=1)
        lower.set(xlabel=curve, xscale="log", yscale="log")
        upper.set(xscale="log", yscale="log")
        for axis in (upper, lower):
            axis.set_xticks(rows[column], [f"{value:g}" for value in rows[column]], minor=False)
            axis.minorticks_off()
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("MB beyond the start")
    axes[0, 0].legend(fontsize=7)
    return figure


def precision(record: Mapping[str, Any]) -> Figure:
    """1 − cosine to the float64 gradient, a point a walk, by images a class."""
    table = pd.DataFrame(record["walks"])
    table["distance"] = 1 - table["cosine"]
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    sns.stripplot(table, x="distance", y="way", hue="ipc", palette="colorblind", ax=axis, size=5, alpha=0.8)
    axis.axvline(0.01, color="0.5", linewidth=1, linestyle="--")
    axis.set(xscale="log", xlabel="1 − cosine to the float64 gradient of the images", ylabel="")
    axis.legend(title="images a class", fontsize=8)
    return figure

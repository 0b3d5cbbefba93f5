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
COLUMNS = ("seconds", "peak_memory_mb", "start_memory_mb", "rate", "convolution_rate", "left_out")


def measurements(record: Mapping[str, Any]) -> pd.DataFrame:
    """A row a measurement of `make bench`; of what was left out, seconds and memory are nan.

    `memory_mb` is how far the process grew beyond what it held before the work.
    """
    table = pd.DataFrame(record["measurements"])
    table = table.reindex(columns=table.columns.union(COLUMNS, sort=False))
    return table.assign(memory_mb=table["peak_memory_mb"] - table["start_memory_mb"])


def part(table: pd.DataFrame, *, apart: bool) -> pd.DataFrame:
    """What compares segments side by side with segments one by one; or all else."""
    own = table["implementation"].str.endswith(APART)
    beside = table["name"].isin(table["name"][own]) & table["implementation"].str.startswith(TEXTBOOK)
    return table[own | beside if apart else ~own & (table["side"] != SMALL_SIDE)]


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

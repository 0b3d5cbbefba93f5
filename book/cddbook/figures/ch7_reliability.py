"""Figures of chapter 7: what the fault, fuzzing, scaling and reproducibility tests recorded."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from cddbook.figures.style import MARKERS, PERCENT
from cddbook.tables import markdown


def _stacked(table: pd.DataFrame, xlabel: str) -> Figure:
    """Horizontal bars, a row each, made of the columns."""
    figure, axis = plt.subplots(figsize=(6.4, 0.6 + 0.36 * len(table)))
    table.plot.barh(stacked=True, width=0.8, ax=axis, legend=False)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set(xlabel=xlabel, ylabel="")
    if len(table.columns) > 1:
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(table.columns))
    return figure


def kills(record: Mapping[str, Any]) -> Figure:
    """How many times each kind of work was killed, and went on to the same bytes."""
    table = pd.DataFrame(record["kills"]).groupby("work", sort=False)["kills"].sum()
    return _stacked(table.to_frame("kills"), "times killed with SIGKILL, and resumed to the same bytes")


def damage(record: Mapping[str, Any]) -> Figure:
    """What became of damaged copies of every file: refused, or harmless because nothing depended on them."""
    table = pd.DataFrame(record["damage"]).groupby("file", sort=False)[["refused", "harmless"]].sum()
    return _stacked(table, "damaged copies of the file")


def fuzzed(record: Mapping[str, Any]) -> Figure:
    """What loaders made of inputs: damaged files, sealed lies, and options."""
    table = pd.DataFrame(record["loaders"])
    table.index = pd.Index(table["loader"] + ", " + table["kind"])
    columns = {"refused": "refused", "unchanged": "read as it was", "valid": "another valid one"}
    return _stacked(table.rename(columns=columns)[list(columns.values())], "inputs")


def drift(record: Mapping[str, Any]) -> Figure:
    """Relative difference of the matching losses to another machine's, at some iterations; 0 is drawn at the bottom."""
    figure, axis = plt.subplots()
    losses = [pd.Series(found["losses"], name=variant) for variant, found in list(record["variants"].items())[1:]]
    table = pd.concat(losses, axis=1).rename(index=int).clip(lower=1e-9)
    table.plot(
        ax=axis, loglog=True, style=[f"{marker}-" for marker in MARKERS], ylabel="largest relative difference of a loss"
    )
    axis.set_xticks(table.index, table.index.astype(str))
    axis.set(xlabel="iteration")
    axis.minorticks_off()
    return figure


def speedups(record: Mapping[str, Any]) -> Figure:
    """How many times faster an iteration is with several processes: measured, and as the model has it."""
    table = pd.DataFrame(record["measured"])
    figure, axis = plt.subplots()
    for ((work, segments), rows), marker in zip(table.groupby(["work", "segments"], sort=False), MARKERS, strict=False):
        rows = rows.set_index("processes").sort_index()
        alone = rows["seconds"].iloc[0]
        (drawn,) = axis.plot(alone / rows["seconds"], marker, label=f"{work}, K = {segments}")
        axis.plot(alone / rows["predicted"], color=drawn.get_color())
    counts = sorted(set(table["processes"]))
    axis.plot(counts, counts, color="0.4", linestyle=":")
    axis.set(xlabel="processes", ylabel="times as fast as one process", xticks=counts)
    axis.legend(fontsize=8)
    return figure


def _curves(record: Mapping[str, Any]) -> pd.DataFrame:
    """The model's points, with the name of the curve that each belongs to."""
    table = pd.DataFrame(record["model"])
    work = (table["segments"] * table["concurrent_experts"]).astype(str) + " segments"
    each = table["segments"].astype(str) + " segments a device"
    table["curve"] = table["set"] + ", " + work.where(table["scaling"] == "strong", each)
    return table


def efficiencies(record: Mapping[str, Any]) -> Figure:
    """The model's efficiency on many devices."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    for (curve, rows), marker in zip(_curves(record).groupby("curve", sort=False), MARKERS, strict=False):
        line = "-" if rows["scaling"].iloc[0] == "strong" else "--"
        axis.plot(rows["devices"], rows["efficiency"], line, marker=marker, markersize=4, label=curve)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="devices", ylabel="efficiency, by the model", ylim=(0, 1.05))
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.yaxis.set_major_formatter(PERCENT)
    axis.legend(fontsize=8)
    return figure


PARTS = {
    "compute": "computing itself",
    "idle": "devices that have no segment",
    "slowest": "the slowest device",
    "communication": "the all-reduce",
    "alone": "what every device does: drawing students, the optimiser's step",
}
"""The parts of an iteration (`Parts` of tests/benchmarks/scaling.py) in words."""


def binding_table(record: Mapping[str, Any]) -> str:
    """What keeps each curve of the model from its ideal, and from how many devices on; a Markdown table."""
    curves = [rows.sort_values("devices") for _, rows in _curves(record).groupby("curve", sort=False)]
    begins = pd.concat([rows[rows["binds"] != rows["binds"].shift()] for rows in curves])
    table = {
        "curve": begins["curve"],
        "devices": begins["devices"].map("from {}".format),
        "efficiency": begins["efficiency"].map("{:.0%}".format),
        "what binds": begins["binds"].map(PARTS),
    }
    return markdown(pd.DataFrame(table))


def total(rows: Sequence[Mapping[str, Any]], column: str) -> int:
    """The sum of one column of a record's rows."""
    return sum(int(row[column]) for row in rows)

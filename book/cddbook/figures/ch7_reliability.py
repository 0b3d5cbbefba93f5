"""Figures of chapter 7: what the fault, fuzzing, scaling and reproducibility tests recorded."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from cddbook.figures.style import MARKERS, PERCENT
from cddbook.tables import markdown


def bars(rows: Sequence[Mapping[str, Any]], by: Sequence[str], columns: Mapping[str, str], xlabel: str) -> Figure:
    """Horizontal bars of a record's rows, summed `by` some columns and made of others, which are named in words."""
    table = pd.DataFrame(rows).groupby(list(by), sort=False)[list(columns)].sum().rename(columns=columns)
    table.index = pd.Index([", ".join(words) for words in table.index.to_frame().to_numpy()])
    figure, axis = plt.subplots(figsize=(6.4, 0.6 + 0.36 * len(table)))
    table.plot.barh(stacked=True, width=0.8, ax=axis, legend=False)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set(xlabel=xlabel, ylabel="")
    if len(columns) > 1:
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(columns))
    return figure


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
    table = pd.DataFrame(record["measured"]).sort_values("processes")
    table["work"] += ", K = " + table["segments"].astype(str)
    alone = table.groupby("work")["seconds"].transform("first")
    table = table.assign(measured=alone / table["seconds"], model=alone / table["predicted"])
    figure, axis = plt.subplots()
    look = {"x": "processes", "hue": "work", "ax": axis}
    sns.scatterplot(table, y="measured", style="work", **look)
    sns.lineplot(table, y="model", legend=False, **look)
    counts = table["processes"].unique()
    axis.plot(counts, counts, color="0.4", linestyle=":")
    axis.set(ylabel="times as fast as one process", xticks=counts)
    axis.legend(fontsize=8)
    return figure


def _curves(record: Mapping[str, Any]) -> pd.DataFrame:
    """The model's points, with the name of the curve that each belongs to."""
    table = pd.DataFrame(record["model"]).sort_values("devices")
    work = (table["segments"] * table["concurrent_experts"]).astype(str) + " segments"
    each = table["segments"].astype(str) + " segments a device"
    table["curve"] = table["set"] + ", " + work.where(table["scaling"] == "strong", each)
    return table


def efficiencies(record: Mapping[str, Any]) -> Figure:
    """The model's efficiency on many devices."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    sns.lineplot(_curves(record), x="devices", y="efficiency", hue="curve", style="scaling", marker="o")
    axis.set_xscale("log", base=2)
    axis.set(ylabel="efficiency, by the model", ylim=(0, 1.05))
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
    table = _curves(record)
    before = table.groupby("curve")["binds"].shift()
    begins = table[table["binds"] != before].sort_values(
        "curve", key=lambda curve: pd.factorize(curve)[0], kind="stable"
    )
    shown = {"curve": begins["curve"], "devices": begins["devices"].map("from {}".format)}
    shown |= {"efficiency": begins["efficiency"].map("{:.0%}".format), "what binds": begins["binds"].map(PARTS)}
    return markdown(pd.DataFrame(shown))


def total(rows: Sequence[Mapping[str, Any]], column: str) -> int:
    """The sum of one column of a record's rows."""
    return sum(int(row[column]) for row in rows)

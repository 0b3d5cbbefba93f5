"""Figures and tables of what `make bench` recorded."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

TEXTBOOK = "textbook"
"""How the names of all implementations begin that cddlib is compared with."""


def _table(record: Mapping[str, Any]) -> pd.DataFrame:
    """A row a measurement; of what was left out, seconds and memory are nan."""
    columns = ["name", "work", "implementation", "seconds", "peak_memory_mb", "rate", "convolution_rate", "left_out"]
    return pd.DataFrame(record["measurements"]).reindex(columns=columns)


def bars(record: Mapping[str, Any], column: str, xlabel: str) -> Figure:
    """Bars of seconds or of memory, on a logarithmic axis; what was left out has its reason in place of a bar."""
    table = _table(record)
    names, implementations = table["name"].unique(), table["implementation"].unique()
    figure, axis = plt.subplots(figsize=(6.4, 0.8 + 0.5 * len(names)))
    height = 0.8 / len(implementations)
    for number, implementation in enumerate(implementations):
        rows = table[table["implementation"] == implementation].set_index("name").reindex(names)
        places = [place + (number - (len(implementations) - 1) / 2) * height for place in range(len(names))]
        axis.barh(places, rows[column], height, label=implementation)
        for place, reason in zip(places, rows["left_out"], strict=True):
            if isinstance(reason, str):
                axis.text(0.01, place, reason, transform=axis.get_yaxis_transform(), va="center", fontsize=7)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set(xscale="log", xlabel=xlabel)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(implementations), fontsize=8)
    return figure


def ratio_table(record: Mapping[str, Any]) -> str:
    """How cddlib compares with the faster of the textbook's ways; a Markdown table."""
    lines = [
        "| work | textbook, s | cddlib, s | times as fast | memory, of the textbook's | of the convolution's rate |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for name, rows in _table(record).groupby("name", sort=False):
        ours = rows[rows["implementation"] == "cddlib"].iloc[0]
        theirs = rows[rows["implementation"].str.startswith(TEXTBOOK)]
        if pd.isna(ours["seconds"]):
            lines.append(f"| {name} | | {ours['left_out']} | | | |")
            continue
        mine = f"{ours['seconds']:.3g} |"
        fraction = f"{ours['rate'] / ours['convolution_rate']:.0%} |"
        if theirs["seconds"].isna().all():
            lines.append(f"| {name} | {theirs['left_out'].iloc[0]} | {mine} | | {fraction}")
            continue
        best = theirs.loc[theirs["seconds"].idxmin()]
        ratio, memory = best["seconds"] / ours["seconds"], ours["peak_memory_mb"] / best["peak_memory_mb"]
        lines.append(f"| {name} | {best['seconds']:.3g} | {mine} {ratio:.2f} | {memory:.2f} | {fraction}")
    return "\n".join(lines)

"""Figures and tables of chapter 8: what `make bench` and the benchmarks of precision recorded on a CPU."""

from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from cddbook.figures import style
from cddbook.tables import markdown, mean_sd

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
    implementations = table["implementation"].unique()
    shown = table.pivot(index="name", columns="implementation").reindex(table["name"].unique())
    figure = style.bars(shown[column][implementations], xlabel)
    (axis,) = figure.axes
    for implementation, drawn in zip(implementations, axis.containers, strict=True):
        for bar, reason in zip(drawn, shown["left_out"][implementation], strict=True):
            if isinstance(reason, str):
                place = bar.get_y() + bar.get_height() / 2
                axis.text(0.01, place, reason, transform=axis.get_yaxis_transform(), va="center", fontsize=6)
    axis.set(xscale="log", xlim=(10 ** np.floor(np.log10(table[column].min())), None))
    return figure


def ratio_table(table: pd.DataFrame, column: str) -> str:
    """How each of cddlib's ways compares with the faster of the textbook's, from `part`; a Markdown table.

    Of `seconds` the ratio says how many times as fast; of `memory_mb` it is the fraction.
    """
    shown, power = ("{:.3g} s", -1) if column == "seconds" else ("{:,.0f} MB", 1)
    table = table.assign(cell=table[column].map(shown.format, na_action="ignore").fillna(table["left_out"]))
    textbook = table["implementation"].str.startswith(TEXTBOOK)
    best = table[textbook].sort_values("seconds", kind="stable").drop_duplicates("name").set_index("name")
    own = table[~textbook].assign(ratio=lambda own: (own[column] / own["name"].map(best[column])) ** power)
    own["cell"] += own["ratio"].map(", {:.2f}".format, na_action="ignore").fillna("")
    cells = own.pivot(index="name", columns="implementation", values="cell")
    cells = cells.reindex(table["name"].unique(), columns=own["implementation"].unique())
    cells.insert(0, TEXTBOOK, best["cell"])
    return markdown(cells.reset_index(names="work"))


def rate_table(table: pd.DataFrame) -> str:
    """The rate of every way as a fraction of the convolution's; a Markdown table."""
    rates = table.assign(fraction=table["rate"] / table["convolution_rate"]).dropna(subset="fraction")
    cells = rates.pivot(index="name", columns="implementation", values="fraction")
    cells = cells.reindex(rates["name"].unique(), columns=rates["implementation"].unique())
    return markdown(cells.map("{:.0%}".format, na_action="ignore").reset_index(names="work"))


def walks(record: Mapping[str, Any], *, longer: bool = False) -> pd.DataFrame:
    """The walks with the usual step size; or those that were walked with longer steps too, at every step size."""
    table = pd.DataFrame(record["walks"])
    sizes = table.groupby(["ipc", "student_steps", "where", "seed"])["step_size"]
    return table[sizes.transform("nunique") > 1 if longer else table["step_size"] == table["step_size"].min()]


def precision(table: pd.DataFrame) -> Figure:
    """1 − cosine of the gradients of `walks` to those in float64, a point a walk, by images a class."""
    table = table.assign(distance=1 - table["cosine"])
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    sns.stripplot(table, x="distance", y="way", hue="ipc", palette="colorblind", ax=axis, size=5, alpha=0.8)
    axis.axvline(0.01, color="0.5", linewidth=1, linestyle="--")
    axis.set(xscale="log", xlabel="1 − cosine to the float64 gradient of the images", ylabel="")
    axis.legend(title="images a class", fontsize=8)
    return figure


def precision_table(table: pd.DataFrame) -> str:
    """How far the gradients of `walks` are from those in float64; a Markdown table."""
    table = table.assign(least=table["cosines_of_images"].map(min), error=table["step_size_error"].abs())
    columns = {"walks": ("loss", "size"), "median matching loss": ("loss", "median")}
    columns |= {"median cosine": ("cosine", "median"), "least cosine": ("cosine", "min")}
    columns |= {"least of an image": ("least", "min"), "largest error of the step size's gradient": ("error", "max")}
    found = table.groupby(["step_size", "way"], sort=False).agg(**columns).reset_index()
    return str(found.to_markdown(index=False, floatfmt=("", "", "", *[".4f"] * 5)))


def accuracies_by_precision(records: Iterable[Mapping[str, Any]]) -> str:
    """Test accuracies by data, work and precision: mean ± standard deviation over networks; a Markdown table."""
    table = pd.concat(pd.DataFrame(record["runs"]).assign(data=record["data"]) for record in records)
    found = table.explode("accuracies").groupby(["data", "work", "precision"], sort=False)["accuracies"]
    cells = found.agg(lambda mine: f"{mean_sd(mine.astype(float), scale=100.0)} ({len(mine)})")
    return markdown(cells.unstack(sort=False).reset_index())

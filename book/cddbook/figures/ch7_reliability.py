"""Figures and tables of chapter 7: what the fault, fuzzing, scaling and reproducibility tests recorded."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from cddbook.figures import style
from cddbook.tables import markdown, mean_sd


def bars(rows: Sequence[Mapping[str, Any]], by: Sequence[str], columns: Mapping[str, str], xlabel: str) -> Figure:
    """Horizontal bars of a record's rows, summed `by` some columns and made of others, which are named in words."""
    table = pd.DataFrame(rows).groupby(list(by), sort=False)[list(columns)].sum().rename(columns=columns)
    table.index = pd.Index([", ".join(words) for words in table.index.to_frame().to_numpy()])
    return style.bars(table, xlabel, stacked=True)


def times_table(done: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """How often something was done, from rows of a record by what they did; Markdown."""
    times = {what: sum(row.get("kills", row.get("times")) for row in rows) for what, rows in done.items()}
    return markdown({"what": what, "times": f"{count:,}"} for what, count in times.items())


def divergence_table(numerics: Mapping[str, Any]) -> str:
    """What became of runs whose numbers explode; Markdown."""
    table = pd.DataFrame(numerics["divergence"])
    stopped = "stopped in " + table["stopped_at"]
    return markdown(pd.DataFrame({"case": table["case"], "what happened": stopped.fillna(table["sentence"])}))


def agreement_table(ranks: Mapping[str, Any]) -> str:
    """Largest relative difference of several processes to one: of all short runs, and of each longer one; Markdown."""
    table = pd.DataFrame(ranks["agreement"])
    short = ~table["rule"].str.contains("iterations")
    table.loc[short, "rule"] = f"short runs: the largest of {table['rule'][short].nunique()} rules and settings"
    table = table.groupby(["rule", "ranks"], sort=False)["largest_relative_difference"].max().map("{:.0e}".format)
    return markdown(table.rename_axis(["K = 8 on the digits", "processes"]).reset_index(name="largest difference"))


def drift(record: Mapping[str, Any]) -> Figure:
    """Relative difference of the matching losses to another machine's, at some iterations; 0 is drawn at the bottom."""
    x, y = "iteration", "largest relative difference of a loss"
    losses = {variant: pd.Series(found["losses"]) for variant, found in list(record["variants"].items())[1:]}
    table = pd.concat(losses, names=["variant", x]).clip(lower=1e-9).reset_index(name=y)
    figure = style.lines(table.astype({x: int}), x, y)
    figure.axes[0].set(xscale="log", yscale="log")
    return figure


def drift_table(record: Mapping[str, Any]) -> str:
    """Whether another machine's run ends with the same bytes, how accurate it is, and what `cddlib verify` finds."""
    rows = []
    for name, found in record["variants"].items():
        worst = max(value for what, value in found["verify"].items() if "accuracies" not in what)
        accuracies, _ = found["test_accuracies"]
        row = {"variant": name, "same bytes at the end": "yes" if found["same_bytes"] else "no"}
        row |= {f"test accuracy, % ({len(accuracies)} networks)": mean_sd(accuracies, scale=100.0)}
        rows.append({**row, "largest difference that `cddlib verify` finds": f"{worst:.1e}"})
    return markdown(rows)


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


def model_sentence(record: Mapping[str, Any]) -> str:
    """How well the model predicts what was measured."""
    errors = [abs(row["error"]) for row in record["measured"] if row["processes"] > 1]
    return f"The model predicts several processes from one. It is off by at most {max(errors):.0%}."


def _curves(record: Mapping[str, Any]) -> pd.DataFrame:
    """The model's points, curve by curve, with the curve's name."""
    table = pd.DataFrame(record["model"])
    work = (table["segments"] * table["concurrent_experts"]).astype(str) + " segments"
    each = table["segments"].astype(str) + " segments a device"
    table["curve"] = table["set"] + ", " + work.where(table["scaling"] == "strong", each)
    return table


def efficiencies(record: Mapping[str, Any]) -> Figure:
    """The model's efficiency on many devices, a panel for each way of giving them work."""
    figure = style.lines(_curves(record), "devices", "efficiency", hue="curve", panel="scaling")
    for axis in figure.axes:
        axis.set_xscale("log", base=2)
        axis.set(ylim=(0, 1.05))
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
    table = table[table["binds"] != table.groupby("curve")["binds"].shift()]
    shown = {"curve": table["curve"], "devices": table["devices"].map("from {}".format)}
    shown |= {"efficiency": table["efficiency"].map("{:.0%}".format), "what binds": table["binds"].map(PARTS)}
    return markdown(pd.DataFrame(shown))

"""Figures of chapter 4: forgetting and accumulated error."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from cddbook.figures.style import lines
from cddbook.findings import Record, runs_of


def probe_losses(record: Record, variants: Sequence[str]) -> Figure:
    """Losses of the probes against matched segments, a panel a variant; mean ± sd over seeds; visits of one seed."""
    x, y, hue, tables = "segments matched", "matching loss of the probe", "start epoch", []
    for run in (run for run in runs_of(record) if run.variant in variants):
        losses, visits = run.probes(skip=0)
        columns = pd.MultiIndex.from_product([run.measured, run.config["probe_starts"]], names=[x, hue])
        table = pd.DataFrame({y: losses.flat, "visited": np.pad(visits, ((1, 0), (0, 0))).flat}, columns).reset_index()
        table[x] *= run.cost
        tables.append(table.assign(variant=run.variant, seed=run.seed))
    table = pd.concat(tables, ignore_index=True)
    figure = lines(table, x, y, hue=hue, panel="variant", palette="viridis")
    ticks = table[table["visited"] & (table["seed"] == table["seed"].min())]
    for axis, (_, mine) in zip(figure.axes, ticks.groupby("variant", sort=False), strict=True):
        sns.scatterplot(mine, x=x, y=y, hue=hue, palette="viridis", marker="|", legend=False, ax=axis, linewidth=1)
    return figure


def error_along(record: Record, variants: Sequence[str]) -> Figure:
    """Accumulated error along the trajectory, and the sums of its two parts; mean ± sd over seeds, last iterate."""
    keys = {"error": "ε, accumulated", "matching_sum": "Σδ, matching", "initialisation_sum": "ΣI, initialisation"}
    ends = [
        pd.DataFrame(run.last_error).assign(variant=run.variant) for run in runs_of(record) if run.variant in variants
    ]
    table = pd.concat(ends, ignore_index=True).rename(columns={"epoch": "expert epoch", **keys})
    parts = table[list(keys.values())].div(table["travelled"], axis=0).join(table[["expert epoch", "variant"]])
    long = parts.melt(["expert epoch", "variant"], value_name="length / way of the expert")
    figure = lines(long, "expert epoch", "length / way of the expert", panel="variable")
    figure.axes[0].set_ylim(bottom=0)
    return figure

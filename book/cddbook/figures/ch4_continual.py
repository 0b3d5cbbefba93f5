"""Figures of chapter 4: forgetting and accumulated error."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from cddbook.figures.style import band, lines
from cddbook.findings import Record, runs_of


def probe_losses(record: Record, variants: Sequence[str]) -> Figure:
    """Losses of the probes against matched segments, a panel a variant; mean ± sd over seeds; visits of one seed."""
    figure, axes = plt.subplots(1, len(variants), figsize=(3.8 * len(variants), 3.6), sharey=True, squeeze=False)
    for axis, variant in zip(axes[0], variants, strict=True):
        runs = [run for run in runs_of(record) if run.variant == variant]
        starts, visits = runs[0].config["probe_starts"], runs[0].probes(skip=0)[1]
        matched = runs[0].cost * np.array(runs[0].measured)
        losses = np.stack([run.probes(skip=0)[0] for run in runs])
        for probe, color in enumerate(sns.color_palette("viridis", len(starts))):
            band(axis, matched, losses[:, :, probe], color=color, label=f"t = {starts[probe]}", alpha=0.15)
            visited = np.flatnonzero(visits[:, probe]) + 1
            axis.plot(matched[visited], losses[0][visited, probe], "|", color=color, markersize=8)
        axis.set(xlabel="segments matched", title=variant)
    axes[0, 0].set_ylabel("matching loss of the probe")
    axes[0, -1].legend(fontsize=8, title="start epoch", title_fontsize=8)
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

"""Figures of chapter 4: forgetting and accumulated error."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from cddbook.figures.style import MARKERS, band
from cddbook.findings import Record, runs_of


def probe_losses(record: Record, variants: Sequence[str]) -> Figure:
    """Losses of the probes against matched segments, a panel a variant; mean ± sd over seeds; visits of one seed."""
    figure, axes = plt.subplots(1, len(variants), figsize=(3.8 * len(variants), 3.6), sharey=True, squeeze=False)
    for axis, variant in zip(axes[0], variants, strict=True):
        runs = [run for run in runs_of(record) if run.variant == variant]
        starts, visits = runs[0].config["probe_starts"], runs[0].probes(skip=0)[1]
        matched = runs[0].cost * np.array([iteration for iteration, _ in runs[0].metrics["probe_losses"]])
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
    figure, axes = plt.subplots(1, len(keys), figsize=(3.1 * len(keys), 3.3), sharey=True)
    for variant, marker in zip(variants, MARKERS, strict=False):
        ends = [run.last_error for run in runs_of(record) if run.variant == variant]
        for axis, key in zip(axes, keys, strict=True):
            values = [end[key] / end["travelled"] for end in ends]
            band(axis, ends[0]["epoch"], values, marker=marker, markersize=4, label=variant)
    for axis, title in zip(axes, keys.values(), strict=True):
        axis.set(xlabel="expert epoch", title=title)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("length / way of the expert")
    axes[0].legend(fontsize=8)
    return figure

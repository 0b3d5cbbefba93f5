"""Figures of chapter 4: forgetting and accumulated error."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from cddbook import continual
from cddbook.figures.style import MARKERS
from cddbook.findings import Record
from cddbook.study import lines_of


def probe_losses(record: Record, variants: Sequence[str]) -> Figure:
    """Losses of the probes against matched segments, a panel a variant; mean ± sd over seeds; visits of one seed."""
    figure, axes = plt.subplots(1, len(variants), figsize=(3.8 * len(variants), 3.6), sharey=True, squeeze=False)
    for axis, variant in zip(axes[0], variants, strict=True):
        runs = {name: run for name, run in record["runs"].items() if name.startswith(f"{variant}/")}
        config = {**record["config"], **next(iter(runs.values()))["changes"]}
        cost = config["segments"] + config["replay"]
        tables = [
            continual.probe_table(lines_of(run["metrics"]), config["probe_starts"], config["probe_expert"])
            for run in runs.values()
        ]
        iterations = [iteration for iteration, _ in next(iter(runs.values()))["metrics"]["probe_losses"]]
        matched = cost * np.asarray(iterations)
        losses = np.stack([table[0] for table in tables])
        colors = sns.color_palette("viridis", losses.shape[2])
        for probe, (start, color) in enumerate(zip(config["probe_starts"], colors, strict=True)):
            mean = losses[:, :, probe].mean(axis=0)
            spread = losses[:, :, probe].std(axis=0, ddof=1) if len(losses) > 1 else 0 * mean
            axis.plot(matched, mean, color=color, label=f"t = {start}")
            axis.fill_between(matched, mean - spread, mean + spread, color=color, alpha=0.15)
            visited = np.flatnonzero(tables[0][1][:, probe]) + 1
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
        ends = [
            run["metrics"]["accumulated_error"][-1][1]
            for name, run in record["runs"].items()
            if name.startswith(f"{variant}/")
        ]
        for axis, key in zip(axes, keys, strict=True):
            values = np.array([[a / b for a, b in zip(end[key], end["travelled"], strict=True)] for end in ends])
            mean, spread = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else 0
            axis.plot(ends[0]["epoch"], mean, marker=marker, markersize=4, label=variant)
            axis.fill_between(ends[0]["epoch"], mean - spread, mean + spread, alpha=0.2)
    for axis, title in zip(axes, keys.values(), strict=True):
        axis.set(xlabel="expert epoch", title=title)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("length / way of the expert")
    axes[0].legend(fontsize=8)
    return figure

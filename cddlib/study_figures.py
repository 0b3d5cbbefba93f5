"""The plots of the studies: correlation, forgetting, accumulated error, comparisons. Same rules as `figures`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.figure import Figure

from cddlib import continual, correlation
from cddlib.figures import MARKERS
from cddlib.findings import Correlations, Record
from cddlib.study import lines_of

DIVERGING = "vlag"  # blue to red through white, told apart by colour-blind readers


# --- Correlation ------------------------------------------------------------------------------------------------


def heat_maps(
    matrices: Mapping[str, Float[np.ndarray, "replicates p p"]],
    starts: Sequence[int],
    *,
    limit: float = 1.0,
    significant: Float[np.ndarray, "p p"] | None = None,
    labels: tuple[str, str] = ("measured: start epoch", "matched: start epoch"),
) -> Figure:
    """Means over replicates, one panel a matrix, white at zero.

    Args:
        matrices: by title.
        starts: the segments' start epochs.
        limit: value of the deepest colours.
        significant: p-values; an entry of the first panel below 0.05 gets a star.
        labels: of the columns and of the rows.
    """
    columns = 2 if len(matrices) == 4 else 3
    rows = -(-len(matrices) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.8 * columns + 0.6, 3.0 * rows), squeeze=False, sharex=True, sharey=True
    )
    for panel, (axis, (title, repeated)) in enumerate(zip(axes.flat, matrices.items(), strict=False)):
        mean = repeated.mean(axis=0)
        text = np.array([[f"{value:.2f}".replace("0.", ".") for value in row] for row in mean], dtype=object)
        if significant is not None and panel == 0:
            text += np.where(significant < 0.05, "*", "")
        sns.heatmap(
            mean,
            annot=text,
            fmt="",
            annot_kws={"fontsize": 8},
            cmap=DIVERGING,
            center=0,
            vmin=-limit,
            vmax=limit,
            square=True,
            xticklabels=starts,
            yticklabels=starts,
            cbar=False,
            ax=axis,
        )
        axis.set_title(title, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel(labels[0])
    for axis in axes[:, 0]:
        axis.set_ylabel(labels[1])
    figure.colorbar(axes[0, 0].collections[0], ax=axes, shrink=0.7)
    return figure


def transfer_prediction(study: Correlations, rates: Mapping[str, float]) -> Figure:
    """Measured transfer of a real step against the first-order prediction, a dot a pair, at the start and the end."""
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.6), sharex=False)
    for axis, when, title in zip(axes, (0, -1), ("on the first images", "on the last images"), strict=True):
        for kind, marker in (("the same segment", "s"), ("another segment", "o")):
            predicted, measured = [], []
            for repeated in study.geometry["sequential"]:
                geometry = repeated[when]
                mask = np.eye(len(study.starts), dtype=bool)
                mask = mask if kind == "the same segment" else ~mask
                predicted += correlation.predicted_transfer(geometry, dict(rates))[mask].tolist()
                measured += correlation.transfer(np.asarray(geometry["losses"]), np.asarray(geometry["after"]))[
                    mask
                ].tolist()
            axis.plot(predicted, measured, marker, alpha=0.6, markersize=4, label=kind)
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.axvline(0, color="0.4", linewidth=0.8)
        axis.axline((0, 0), slope=1, color="0.4", linestyle=":")
        axis.set(xlabel="predicted from gradients", title=title)
    axes[0].set_ylabel("loss taken off by a real step")
    axes[0].legend()
    return figure


def sign_agreement(study: Correlations, rates: Mapping[str, float]) -> str:
    """How often a gradient's sign tells what a real step on another segment does, and how much of it."""
    parts = []
    for when, name in ((0, "first"), (-1, "last")):
        signs, negative = [], []
        for repeated in study.geometry["sequential"]:
            predicted = correlation.off_diagonal(correlation.predicted_transfer(repeated[when], dict(rates)))
            measured = correlation.off_diagonal(
                correlation.transfer(np.asarray(repeated[when]["losses"]), np.asarray(repeated[when]["after"]))
            )
            signs += (np.sign(predicted) == np.sign(measured)).tolist()
            negative += (measured < 0).tolist()
        parts.append(
            f"on the {name} images prediction and measurement agree in sign for {np.mean(signs):.0%} of the pairs, and "
            f"{np.mean(negative):.0%} of the steps raise the other segment's loss"
        )
    return "Off the diagonal, " + "; ".join(parts) + "."


# --- Forgetting -------------------------------------------------------------------------------------------------


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


# --- Comparisons ------------------------------------------------------------------------------------------------


def _cell(values: pd.Series, *, scale: float, digits: int) -> str:
    if values.isna().all():
        return "–"
    spread = f" ± {scale * values.std():.{digits}f}" if values.count() > 1 else ""
    return f"{scale * values.mean():.{digits}f}{spread}"


def comparison_table(table: pd.DataFrame) -> str:
    """Markdown of `findings.comparison`: a row a variant, mean ± standard deviation over seeds."""
    columns = {
        "test": ("test accuracy, %", 100.0, 1),
        "error": ("ε / way", 1.0, 3),
        "forgetting": ("forgetting", 1.0, 3),
        "backward": ("backward transfer", 1.0, 3),
        "events": ("events, %", 100.0, 0),
        "wall": ("matching, s", 1.0, 1),
        "memory": ("memory, MB", 1.0, 0),
    }
    lines = [
        "| variant | " + " | ".join(title for title, _, _ in columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for variant, mine in table.groupby("variant", sort=False, observed=True):
        cells = [_cell(mine[key], scale=scale, digits=digits) for key, (_, scale, digits) in columns.items()]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    seeds = table["seed"].nunique()
    note = (
        f"Mean ± standard deviation over {seeds} distillations, at equal compute. Memory is the peak of the process, "
        "with data and validation: a run's own only if it had a process of its own, as in the records, not in the "
        "runs of this build."
    )
    return "\n".join([*lines, "", note])


def baselines_in_words(record: Record) -> str:
    """Test accuracy of networks trained on random real images and on all training images, under the same protocol."""
    found: dict[str, list[float]] = {"random_real": [], "full": []}
    for run in record["runs"].values():
        for entry in run["evaluations"]:
            for key, values in found.items():
                values += entry[key]
    parts = [
        f"{name} {100 * np.mean(found[key]):.1f} ± {100 * np.std(found[key], ddof=1):.1f} ({len(found[key])} networks)"
        for key, name in (("random_real", "random real images"), ("full", "all training images for as many steps"))
    ]
    return "Test accuracy in percent under the same protocol: " + "; ".join(parts) + "."


def provenance_in_words(record: Record) -> str:
    """Where and for how long the runs of a study ran."""
    results: list[dict[str, Any]] = [run["result"] for run in record["runs"].values()]
    seconds = math.fsum(result["seconds"] for result in results)
    config, first = record["config"], results[0]
    commit = (first["commit"] or "unknown")[:12]
    return (
        f"{len(results)} runs, {seconds / 60:.0f} minutes of distillation in all; threads a run: {first['threads']}, "
        f"{first['device']}, torch {first['versions']['torch']}, commit `{commit}`; {config['data']}, "
        f"IPC {config['ipc']}, width {config['width']}, N = {config['student_steps']}, M = {config['expert_epochs']}, "
        f"window [{config['window_start']}, {config['window_end']})."
    )

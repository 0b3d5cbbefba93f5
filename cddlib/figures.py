"""Every plot in the book. Each function draws what it is given and returns a matplotlib figure, or HTML."""

import base64
import html
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from cddlib.files import read_json
from cddlib.runs import Metrics
from cddlib.segments import SegmentsConfig, draw_segments
from cddlib.trajectory import Buffer

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def use_style() -> None:
    """Colour-blind palette, white background, text that stays readable at 640 pixels."""
    sns.set_theme(style="whitegrid", palette="colorblind", font_scale=1.0)
    plt.rcParams.update({"figure.dpi": 100, "figure.figsize": (6.4, 3.6), "figure.constrained_layout.use": True})


def _as_percent(axes: Any) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


# --- Buffering --------------------------------------------------------------------------------------------------


def pictures(images: Float[Tensor, "n c h w"], titles: Sequence[str], *, columns: int = 10) -> Figure:
    """Images with values between 0 and 1, in rows of `columns`, each under its title."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(0.75 * columns, 0.95 * rows), squeeze=False)
    for axis, image, title in itertools.zip_longest(axes.flat, images.cpu(), titles):
        axis.axis("off")
        if image is not None:
            axis.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_title(title, fontsize=9)
    return figure


def expert_accuracy(buffer: Buffer) -> Figure:
    """Validation accuracy of every expert after each epoch, and their mean."""
    table = pd.DataFrame([expert["validation_accuracy"] for expert in buffer.experts])
    figure, axis = plt.subplots()
    axis.plot(table.T, color="0.7", linewidth=1)
    axis.errorbar(
        table.columns, table.mean(), table.std() if len(table) > 1 else None, marker="o", capsize=2, label="mean ± sd"
    )
    axis.set(xlabel="epoch t", ylabel="validation accuracy")
    axis.legend(loc="lower right")
    _as_percent(axis)
    return figure


def trajectory_lengths(buffer: Buffer) -> Figure:
    """How far experts are from where they started, and how far one epoch moves them."""
    rows = []
    for expert in range(len(buffer.experts)):
        points = torch.stack([buffer.parameters(expert, epoch) for epoch in range(buffer.epochs + 1)])
        for epoch in range(buffer.epochs + 1):
            away = (points[epoch] - points[0]).norm().item()
            rows.append({"epoch t": epoch, "distance": away, "of": "from the start, ‖θ*_t − θ*_0‖"})
            if epoch:
                moved = (points[epoch] - points[epoch - 1]).norm().item()
                rows.append({"epoch t": epoch, "distance": moved, "of": "in one epoch, ‖θ*_t − θ*_{t−1}‖"})
    figure, axis = plt.subplots()
    sns.lineplot(pd.DataFrame(rows), x="epoch t", y="distance", hue="of", style="of", markers=True, errorbar="sd")
    sns.move_legend(axis, "best", title=None)
    return figure


# --- Matching ---------------------------------------------------------------------------------------------------


def segment_draws(configs: Sequence[SegmentsConfig], draws: int, generator: torch.Generator) -> Figure:
    """The start epochs of some iterations, one panel for each configuration; the anchor is filled."""
    figure, axes = plt.subplots(1, len(configs), figsize=(3.2 * len(configs), 3.2), sharey=True, squeeze=False)
    for axis, config in zip(axes[0], configs, strict=True):
        for iteration in range(draws):
            drawn = draw_segments(config, iteration, generator)
            for k, start in enumerate(drawn.starts):
                is_anchor = k == drawn.anchor
                axis.plot([start, start + config.expert_epochs], [iteration] * 2, color="C0", alpha=0.4, linewidth=4)
                axis.plot(start, iteration, "o", color="C3", fillstyle="full" if is_anchor else "none")
        axis.set(xlabel="expert epoch", title=f"K = {config.segments}")
        axis.set_xlim(config.window_start - 0.5, config.window_end + config.expert_epochs - 0.5)
    axes[0, 0].set(ylabel="iteration")
    return figure


def student_paths(distances: Mapping[str, Float[Tensor, "repeats steps"]]) -> Figure:
    """Normalised squared distance to the target after each student step; mean and standard deviation over repeats."""
    figure, axis = plt.subplots()
    for (label, values), marker in zip(distances.items(), MARKERS, strict=False):
        steps, mean, spread = np.arange(values.shape[1]), values.mean(0).numpy(), values.std(0).numpy()
        axis.plot(steps, mean, marker=marker, markevery=max(1, len(steps) // 10), label=label)
        axis.fill_between(steps, mean - spread, mean + spread, alpha=0.25)
    axis.axhline(1, color="0.4", linestyle=":")
    axis.set(xlabel="student step i", ylabel="matching loss if it stopped here")
    axis.legend()
    return figure


def _by_steps(record: Mapping[str, Any]) -> pd.DataFrame:
    """The measurements of single segments."""
    table = pd.DataFrame(record["measurements"])
    return table[table["implementation"].isin(("cddlib", "textbook"))].copy()


def memory_against_steps(record: Mapping[str, Any]) -> Figure:
    """Peak memory of one matching loss and its gradient against the student's steps, for each implementation."""
    table = _by_steps(record)
    table["above"] = table["peak_mb"] - table["start_mb"]
    figure, axis = plt.subplots()
    sns.lineplot(table, x="student_steps", y="above", hue="implementation", style="implementation", markers=True)
    axis.set(xlabel="student steps N", ylabel="peak memory above the start, MB")
    axis.set_ylim(bottom=0)
    return figure


def memory_in_words(record: Mapping[str, Any]) -> str:
    """The numbers behind `memory_against_steps`, and where they were measured."""
    table = _by_steps(record)
    parts = []
    for implementation, mine in table.groupby("implementation"):
        above = (mine["peak_mb"] - mine["start_mb"]).round().astype(int)
        pairs = ", ".join(f"{mb} MB at N = {steps}" for steps, mb in zip(mine["student_steps"], above, strict=True))
        parts.append(f"{implementation}: {pairs}")
    config = record["config"]
    return (
        f"Above the process's {table['start_mb'].median():.0f} MB, with {config['images']} images and width "
        f"{config['width']} on {record['device']}: " + "; ".join(parts) + "."
    )


# --- Concurrent matching ----------------------------------------------------------------------------------------


def read_runs(folders: Mapping[tuple[int, int], Path]) -> pd.DataFrame:
    """Metrics of runs keyed by (segments, seed): a row an iteration, with the segments matched until then."""
    tables = []
    for (segments, seed), folder in folders.items():
        iterations = read_json(folder / "config.json")["iterations"]
        table = pd.DataFrame(Metrics.read(folder / "metrics.jsonl", until=iterations))
        table["segments"], table["seed"] = segments, seed
        table["variant"] = f"K = {segments}"
        table["matched"] = table["iteration"] * segments
        table["elapsed"] = table["seconds"].fillna(0).cumsum()
        accuracy = table["validation_accuracy"]
        table["accuracy"] = accuracy.map(lambda values: np.mean(values) if isinstance(values, list) else np.nan)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def accuracy_curves(table: pd.DataFrame) -> Figure:
    """Validation accuracy against iterations, matched segments and seconds of matching; mean ± sd over seeds.

    Args:
        table: from `read_runs` or `findings.curves`; seconds are averaged over seeds.
    """
    measured = table.dropna(subset="accuracy")
    labels = {"iteration": "iterations", "matched": "segments matched = K · iterations", "elapsed": "seconds matching"}
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.5), sharey=True)
    for axis, (x, label) in zip(axes, labels.items(), strict=True):
        for (variant, mine), marker in zip(measured.groupby("variant", sort=False), MARKERS, strict=False):
            points = mine.groupby("iteration").agg(x=(x, "mean"), mean=("accuracy", "mean"), sd=("accuracy", "std"))
            spread = points["sd"].fillna(0)
            axis.plot(points["x"], points["mean"], marker=marker, markersize=4, label=variant)
            axis.fill_between(points["x"], points["mean"] - spread, points["mean"] + spread, alpha=0.2)
        axis.set(xlabel=label)
    axes[0].set_ylabel("validation accuracy")
    axes[-1].legend(fontsize=8)
    _as_percent(axes[0])
    return figure


def loss_by_segments(runs: pd.DataFrame) -> Figure:
    """Matching loss (mean over the K segments) against iterations, smoothed over five; mean ± sd over seeds."""
    table = runs.dropna(subset="loss").rename(columns={"segments": "K"})
    table["loss"] = table.groupby(["K", "seed"])["loss"].transform(lambda loss: loss.rolling(5, min_periods=1).mean())
    figure, axis = plt.subplots()
    sns.lineplot(table, x="iteration", y="loss", hue="K", style="K", palette="colorblind", errorbar="sd")
    axis.set(ylabel="matching loss")
    return figure


def accuracy_table(runs: pd.DataFrame) -> str:
    """Markdown of validation accuracy for each K: at equal iterations, and at equal compute, with paired differences.

    Equal compute takes, for each K, its last validated iterate within the matched segments that the smallest K spent.
    """
    measured = runs.dropna(subset="accuracy")
    last, budget = measured["iteration"].max(), measured.groupby("segments")["matched"].max().min()
    lines = [
        f"Validation accuracy, mean ± standard deviation over {runs['seed'].nunique()} seeds; in brackets, segments "
        "matched until then; below it, the difference to the smallest K with the same seed; median seconds an "
        "iteration on this machine.",
        "",
        f"| K | after {last} iterations | after at most {budget} matched segments | seconds |",
        "|---|---|---|---|",
    ]
    reference: list[pd.Series] = []
    for segments, mine in measured.groupby("segments"):
        within = mine[(mine["matched"] <= budget) & (mine["iteration"] > 0)]
        ends = [part[part["iteration"] == part["iteration"].max()].set_index("seed") for part in (mine, within)]
        reference = reference or [end["accuracy"] for end in ends]
        cells = [_accuracy_cell(end, first) for end, first in zip(ends, reference, strict=True)]
        seconds = runs[runs["segments"] == segments]["seconds"].median()
        lines.append(f"| {segments} | {cells[0]} | {cells[1]} | {seconds:.3f} |")
    return "\n".join(lines)


def _accuracy_cell(end: pd.DataFrame, reference: pd.Series) -> str:
    """Mean ± sd of the last accuracies, the segments matched for them, and the paired difference to `reference`."""
    if end.empty:
        return "not validated that early"
    difference = 100 * (end["accuracy"] - reference)
    cell = f"{end['accuracy'].mean():.1%} ± {end['accuracy'].std():.1%} ({end['matched'].iloc[0]})"
    return cell if not difference.any() else f"{cell}<br>{difference.mean():+.1f} ± {difference.std():.1f} points"


def captioned(figure: Figure, caption: str, alt: str, *, attributes: str = 'style="margin:0"') -> str:
    """A figure as HTML, with words that a function made of its numbers; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    picture = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure {attributes}><img src="data:image/png;base64,{picture}" alt="{html.escape(alt)}" '
        f'style="max-width:100%"><figcaption>{html.escape(caption)}</figcaption></figure>'
    )


def slider(frames: Mapping[int, Figure], alts: Mapping[int, str], *, label: str, name: str) -> str:
    """Frames behind a slider, as HTML that needs neither a kernel nor a network; each frame has its alt text.

    Args:
        frames: a figure for each position of the slider; they are closed.
        alts: what each frame shows, in words; also written below it.
        label: what the slider turns.
        name: an identifier, unique on the page.
    """
    blocks = []
    for index, (value, figure) in enumerate(frames.items()):
        attributes = f'data-value="{value}" style="margin:0"{" hidden" if index else ""}'
        blocks.append(captioned(figure, alts[value], alts[value], attributes=attributes))
    first = next(iter(frames))
    script = (
        f"const frames = document.querySelectorAll('#{name} figure'), value = frames[this.value].dataset.value;"
        "frames.forEach((frame, i) => frame.hidden = i != this.value);"
        "this.nextElementSibling.value = value; this.setAttribute('aria-valuetext', value);"
    )
    return (
        f'<div id="{name}"><label>{html.escape(label)} '
        f'<input type="range" min="0" max="{len(frames) - 1}" value="0" step="1" autocomplete="off" '
        f'aria-valuetext="{first}" '
        f'oninput="{script}"> <output>{first}</output></label>{"".join(blocks)}</div>'
    )


def accuracy_bars(accuracies: Mapping[str, Sequence[float]]) -> Figure:
    """Test accuracy of networks trained on each set: mean, standard deviation, and every network as a dot."""
    table = pd.DataFrame([{"set": name, "accuracy": a} for name, values in accuracies.items() for a in values])
    figure, axis = plt.subplots()
    sns.barplot(table, x="accuracy", y="set", errorbar="sd", capsize=0.2, color="C0", alpha=0.6)
    sns.stripplot(table, x="accuracy", y="set", color="0.2", size=4)
    axis.set(xlabel="test accuracy", ylabel=None, xlim=(0, 1))
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def accuracies_by_set(evaluations: Mapping[int, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Test accuracies by name, from evaluation records keyed by K; the first one has the baselines."""
    accuracies = {f"distilled, K = {k}": record["accuracies"]["synthetic"] for k, record in evaluations.items()}
    baselines = next(iter(evaluations.values()))["accuracies"]
    return {
        **accuracies,
        "random real images": baselines["random_real"],
        "all training images": baselines["full"],
    }


def accuracies_in_words(accuracies: Mapping[str, Sequence[float]]) -> str:
    """The numbers behind `accuracy_bars`."""
    parts = [
        f"{name} {100 * np.mean(values):.1f}" + (f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else "")
        for name, values in accuracies.items()
    ]
    networks = {len(values) for values in accuracies.values()}
    counted = " or ".join(str(count) for count in sorted(networks))
    return f"Test accuracy in percent, mean ± standard deviation over {counted} networks: " + "; ".join(parts) + "."


def run_table(records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """What distillation runs cost and reached, a column each, from their records."""
    columns = {}
    for name, record in records.items():
        losses = [line["loss"] for line in record["metrics"] if "loss" in line]
        columns[name] = {
            "iterations": record["config"]["iterations"],
            "seconds an iteration (median)": f"{record['result']['seconds_per_iteration']:.1f}",
            "whole run, minutes": f"{record['result']['seconds'] / 60:.1f}",
            "peak memory of the process, MB": f"{record['result']['peak_memory_mb']:.0f}",
            "matching loss, first 10 iterations": f"{np.mean(losses[:10]):.3f}",
            "matching loss, last 10 iterations": f"{np.mean(losses[-10:]):.3f}",
            "step size, last": f"{record['metrics'][-1]['step_size']:.4f}",
            "iteration selected by validation": record["result"]["selected_iteration"],
        }
    return pd.DataFrame(columns)

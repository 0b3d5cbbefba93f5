"""Figures of chapter 2: segments and students."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from cddbook.figures.style import lines
from cddlib.matching.segments import SegmentsConfig, draw_segments


def segment_draws(configs: Sequence[SegmentsConfig], draws: int, generator: torch.Generator) -> Figure:
    """The start epochs of some iterations, one panel for each configuration; the anchor is filled."""
    figure, axes = plt.subplots(1, len(configs), figsize=(3.2 * len(configs), 3.2), sharey=True, squeeze=False)
    for axis, config in zip(axes[0], configs, strict=True):
        for iteration in range(draws):
            drawn = draw_segments(config, iteration, generator)
            for k, start in enumerate(drawn.starts):
                axis.plot([start, start + config.expert_epochs], [iteration] * 2, color="C0", alpha=0.4, linewidth=4)
                axis.plot(start, iteration, "o", color="C3", fillstyle="full" if k == drawn.anchor else "none")
        axis.set(xlabel="expert epoch", title=f"K = {config.segments}")
        axis.set_xlim(config.window_start - 0.5, config.window_end + config.expert_epochs - 0.5)
    axes[0, 0].set(ylabel="iteration")
    return figure


def distances_to_target(path: list[Float[Tensor, " p"]], target: Float[Tensor, " p"]) -> Float[Tensor, " steps"]:
    """‖θ_i − θ*_{t+M}‖² / ‖θ_0 − θ*_{t+M}‖² for i = 0 … N; the last one is the matching loss."""
    return torch.stack([(theta - target).square().sum() for theta in path]) / (path[0] - target).square().sum()


def student_paths(distances: Mapping[str, Float[Tensor, "repeats steps"]]) -> Figure:
    """Normalised squared distance to the target after each student step; mean and standard deviation over repeats."""
    x, y = "student step i", "matching loss if it stopped here"
    tables = {label: pd.DataFrame(values.numpy()).melt(var_name=x, value_name=y) for label, values in distances.items()}
    figure = lines(pd.concat(tables, names=["images"]).reset_index(), x, y, hue="images")
    figure.axes[0].axhline(1, color="0.4", linestyle=":")
    return figure


def memory_against_steps(record: Mapping[str, Any]) -> Figure:
    """Peak memory of one matching loss and its gradient against the student's steps, for each implementation."""
    table = pd.DataFrame(record["measurements"]).query("implementation in ('cddlib', 'textbook')")
    x, y = "student steps N", "peak memory above the start, MB"
    table = table.rename(columns={"student_steps": x}).assign(**{y: table["peak_mb"] - table["start_mb"]})
    figure = lines(table, x, y, hue="implementation")
    figure.axes[0].set_ylim(bottom=0)
    return figure

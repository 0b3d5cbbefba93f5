"""Figures of chapter 1: experts."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

from cddbook.figures.style import _as_percent
from cddlib.experts.buffer import Buffer


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

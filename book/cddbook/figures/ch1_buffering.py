"""Figures of chapter 1: experts."""

import pandas as pd
import torch
from matplotlib.figure import Figure

from cddbook.figures.style import lines
from cddlib.experts.buffer import Buffer


def expert_accuracy(buffer: Buffer) -> Figure:
    """Validation accuracy after each epoch; mean and standard deviation over experts."""
    table = pd.DataFrame([expert["validation_accuracy"] for expert in buffer.experts])
    table = table.melt(var_name="epoch t", value_name="validation accuracy").assign(of="mean of the experts")
    return lines(table, "epoch t", "validation accuracy", hue="of")


def trajectory_lengths(buffer: Buffer) -> Figure:
    """How far experts are from where they started, and how far one epoch moves them."""
    rows = []
    for expert in range(len(buffer.experts)):
        points = torch.stack([buffer.parameters(expert, epoch) for epoch in range(buffer.epochs + 1)])
        away = (points - points[0]).norm(dim=1).tolist()
        moved = points.diff(dim=0).norm(dim=1).tolist()
        rows += [(epoch, distance, "from the start, ‖θ*_t − θ*_0‖") for epoch, distance in enumerate(away)]
        rows += [(epoch, distance, "in one epoch, ‖θ*_t − θ*_{t−1}‖") for epoch, distance in enumerate(moved, 1)]
    return lines(pd.DataFrame(rows, columns=["epoch t", "distance", "of"]), "epoch t", "distance", hue="of")

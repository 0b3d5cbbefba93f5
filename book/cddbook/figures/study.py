"""The plots of the studies: correlation, forgetting, accumulated error, comparisons. Same rules as `figures`."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from jaxtyping import Float
from matplotlib.figure import Figure

from cddbook import correlation
from cddbook.findings import Correlations

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
            for repeated in study.similarity["sequential"]:
                similarity = repeated[when]
                mask = np.eye(len(study.starts), dtype=bool)
                mask = mask if kind == "the same segment" else ~mask
                predicted += correlation.predicted_transfer(similarity, dict(rates))[mask].tolist()
                measured += correlation.transfer(np.asarray(similarity["losses"]), np.asarray(similarity["after"]))[
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
        for repeated in study.similarity["sequential"]:
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

"""Figures of chapter 3: how matching one segment changes the others."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from jaxtyping import Float
from matplotlib.figure import Figure

from cddbook import correlation
from cddbook.correlation import Matrix
from cddbook.findings import Correlations


def heat_maps(
    matrices: Mapping[str, Float[np.ndarray, "replicates p p"]],
    starts: Sequence[int],
    *,
    limit: float = 1.0,
    significant: Float[np.ndarray, "p p"] | None = None,
    labels: tuple[str, str] = ("measured: start epoch", "matched: start epoch"),
) -> Figure:
    """Means ± standard deviations over replicates, one panel a matrix, white at zero.

    Args:
        matrices: by title.
        starts: the segments' start epochs.
        limit: value of the deepest colours.
        significant: p-values; an entry of the first panel below 0.05 gets a star.
        labels: of the columns and of the rows.
    """
    columns = 2 if len(matrices) == 4 else 3
    rows = -(-len(matrices) // columns)
    size = (2.8 * columns + 0.6, 3.0 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True)
    for panel, (axis, (title, repeated)) in enumerate(zip(axes.flat, matrices.items(), strict=False)):
        mean, spread = repeated.mean(axis=0), repeated.std(axis=0, ddof=min(1, len(repeated) - 1))
        stars = np.where(significant < 0.05, "*", "") if significant is not None and panel == 0 else ""
        text = np.char.replace(np.vectorize("{:.2f}{}\n±{:.2f}".format)(mean, stars, spread), "0.", ".")
        shades = {"cmap": "vlag", "vmin": -limit, "vmax": limit}  # told apart by colour-blind readers
        words = {"annot": text, "fmt": "", "annot_kws": {"fontsize": 7}, "xticklabels": starts, "yticklabels": starts}
        sns.heatmap(mean, **shades, **words, square=True, cbar=False, ax=axis)
        axis.set_title(title, fontsize=10)
    plt.setp(axes[-1], xlabel=labels[0])
    plt.setp(axes[:, 0], ylabel=labels[1])
    figure.colorbar(axes[0, 0].collections[0], ax=axes, shrink=0.7)
    return figure


def _transfers(study: Correlations, rates: Mapping[str, float], when: int) -> list[tuple[Matrix, Matrix]]:
    """Transfer as gradients predict it and as real steps show it, by replicate; first images `when` 0, last -1."""
    found = [repeated[when] for repeated in study.similarity["sequential"]]
    return [(correlation.predicted_transfer(one, rates), correlation.transfer(one)) for one in found]


def transfer_prediction(study: Correlations, rates: Mapping[str, float]) -> Figure:
    """Measured transfer of a real step against the first-order prediction, a dot a pair, at the start and the end."""
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.6), sharex=False)
    same = np.eye(len(study.starts), dtype=bool)
    for axis, when, title in zip(axes, (0, -1), ("on the first images", "on the last images"), strict=True):
        for label, mask, marker in (("the same segment", same, "s"), ("another segment", ~same, "o")):
            pairs = [(predicted[mask], measured[mask]) for predicted, measured in _transfers(study, rates, when)]
            axis.plot(*np.concatenate(pairs, axis=1), marker, alpha=0.6, markersize=4, label=label)
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
        transfers = [[correlation.off_diagonal(m) for m in pair] for pair in _transfers(study, rates, when)]
        predicted, measured = np.concatenate(transfers, axis=1)
        parts.append(
            f"on the {name} images prediction and measurement agree in sign for "
            f"{np.mean(np.sign(predicted) == np.sign(measured)):.0%} of the pairs, and "
            f"{np.mean(measured < 0):.0%} of the steps raise the other segment's loss"
        )
    return "Off the diagonal, " + "; ".join(parts) + "."

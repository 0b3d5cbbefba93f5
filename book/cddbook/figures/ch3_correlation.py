"""Figures of chapter 3: how matching one segment changes the others."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.figure import Figure

from cddbook import correlation
from cddbook.findings import Correlations
from cddbook.tables import markdown


def heat_maps(
    matrices: Mapping[str, Float[np.ndarray, "replicates p p"]],
    starts: Sequence[int],
    *,
    limit: float = 1.0,
    significant: Mapping[str, Float[np.ndarray, "p p"]] | None = None,
    labels: tuple[str, str] = ("measured: start epoch", "matched: start epoch"),
) -> Figure:
    """Means ± standard deviations over replicates, a panel a title, white at zero and deepest at the `limit`.

    An entry gets a star where the p-value in `significant` is below 0.05; `labels` are of columns and of rows.
    """
    columns = 2 if len(matrices) in (2, 4) else 3
    rows = -(-len(matrices) // columns)
    size = (2.8 * columns + 0.6, 3.0 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True)
    for axis, (title, repeated) in zip(axes.flat, matrices.items(), strict=False):
        mean, spread = repeated.mean(axis=0), repeated.std(axis=0, ddof=min(1, len(repeated) - 1))
        stars = np.where((significant or {}).get(title, np.ones_like(mean)) < 0.05, "*", "")
        text = np.char.replace(np.vectorize("{:.2f}{}\n±{:.2f}".format)(mean, stars, spread), "0.", ".")
        shades = {"cmap": "vlag", "vmin": -limit, "vmax": limit}  # told apart by colour-blind readers
        words = {"annot": text, "fmt": "", "annot_kws": {"fontsize": 7}, "xticklabels": starts, "yticklabels": starts}
        sns.heatmap(mean, **shades, **words, square=True, cbar=False, ax=axis)
        axis.set_title(title, fontsize=10)
    plt.setp(axes[-1], xlabel=labels[0])
    plt.setp(axes[:, 0], ylabel=labels[1])
    figure.colorbar(axes[0, 0].collections[0], ax=axes, shrink=0.7)
    return figure


def transfers(study: Correlations, rates: Mapping[str, float]) -> pd.DataFrame:
    """What a real step takes off a loss, as gradients predict it and as measured: a row a pair of segments."""
    tables, whose = [], np.where(np.eye(len(study.starts), dtype=bool), "the same segment", "another segment")
    for repeated in study.similarity["sequential"]:
        for when, one in (("first", repeated[0]), ("last", repeated[-1])):
            measured = 1 - np.asarray(one["after"]) / np.asarray(one["losses"])
            values = correlation.predicted_transfer(one, rates), measured, whose
            table = pd.DataFrame(dict(zip(("predicted", "measured", "of"), map(np.ravel, values), strict=True)))
            tables.append(table.assign(images=f"on the {when} images"))
    return pd.concat(tables, ignore_index=True)


def transfer_prediction(table: pd.DataFrame) -> Figure:
    """Measured `transfers` against the first-order prediction, a dot a pair, at the start and the end."""
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.6))
    for axis, (title, mine) in zip(axes, table.groupby("images", sort=False), strict=True):
        look = {"hue": "of", "style": "of", "alpha": 0.6, "legend": axis is axes[0]}
        sns.scatterplot(mine, x="predicted", y="measured", ax=axis, **look)
        axis.axline((0, 0), slope=1, color="0.4", linestyle=":")
        axis.set(xlabel="predicted from gradients", ylabel="loss taken off by a real step", title=title)
    return figure


def sign_agreement(table: pd.DataFrame) -> str:
    """How often a gradient's sign tells what a real step on another segment does, and how often it hurts; Markdown."""
    table = table[table["of"] == "another segment"]
    agree = np.sign(table["predicted"]) == np.sign(table["measured"])
    names = {"prediction and measurement agree in sign": agree, "the step raises the other loss": table["measured"] < 0}
    shares = pd.DataFrame(names).groupby(table["images"], sort=False).mean().map("{:.0%}".format)
    return markdown(shares.reset_index(names="pairs off the diagonal"))

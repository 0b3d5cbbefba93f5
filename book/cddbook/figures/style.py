"""The style of every plot in the book, and figures as HTML. A figure is made from what it is given."""

import base64
import html
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

PERCENT = PercentFormatter(1.0, decimals=0)


def use_style() -> None:
    """Colour-blind palette, white background, text that stays readable at 640 pixels."""
    plt.switch_backend(plt.get_backend())  # Jupyter's shows figures once loaded, unless `rc_context` ends that at once
    sns.set_theme(style="whitegrid", palette="colorblind", font_scale=1.0)
    plt.rcParams.update({"figure.dpi": 100, "figure.figsize": (6.4, 3.6), "figure.constrained_layout.use": True})


def lines(
    table: pd.DataFrame, x: str, y: str, *, hue: str = "variant", panel: str | None = None, palette: str = "colorblind"
) -> Figure:
    """Means of `y` by `x`, with bands of the standard deviation: a line for each `hue`, a plot for each `panel`."""
    dots = table[x].nunique() < 40
    look = {"markers": dots, "dashes": not dots, "height": 3.4, "aspect": 0.9 if panel else 1.4}
    with plt.rc_context({"figure.constrained_layout.use": False}):  # seaborn's grid has a layout of its own
        columns = {"x": x, "y": y, "hue": hue, "style": hue, "col": panel, "palette": palette}
        grid = sns.relplot(table, kind="line", errorbar="sd", facet_kws={"sharex": False}, **columns, **look)
    grid.set_titles("{col_name}")
    if "accuracy" in y or y == "efficiency":
        grid.axes[0, 0].yaxis.set_major_formatter(PERCENT)
    return grid.figure


def bars(table: pd.DataFrame, xlabel: str, **look: Any) -> Figure:
    """Horizontal bars, a row for each of the table's, a colour for each of its columns; `look` is of `plot.barh`."""
    figure, axis = plt.subplots(figsize=(6.4, 0.8 + (0.6 if not look.get("stacked") else 0.36) * len(table)))
    table.plot.barh(ax=axis, width=0.8, legend=False, **look)
    axis.autoscale(axis="y")
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.set(xlabel=xlabel, ylabel="")
    if len(table.columns) > 1:
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8)
    return figure


def pictures(images: Float[Tensor, "n c h w"], titles: Sequence[str]) -> Figure:
    """Images with values between 0 and 1, in rows of ten, each under its title."""
    rows = -(-len(images) // 10)
    figure, axes = plt.subplots(rows, 10, figsize=(7.5, 0.95 * rows), squeeze=False)
    for axis, image, title in itertools.zip_longest(axes.flat, images.cpu(), titles):
        axis.axis("off")
        if image is not None:
            axis.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_title(title, fontsize=9 if max(map(len, titles)) < 9 else 7)
    return figure


def picture(figure: Figure, words: str, attributes: str = "") -> str:
    """A figure as HTML over `words`, which are its alt text too; it is closed."""
    buffer, said = io.BytesIO(), html.escape(words)
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return (
        f'<figure style="margin:0" {attributes}><img src="data:image/png;base64,'
        f'{base64.b64encode(buffer.getvalue()).decode()}" alt="{said}" style="max-width:100%">'
        f"<figcaption>{said}</figcaption></figure>"
    )


def slider(frames: Mapping[int, tuple[Figure, str]], *, label: str, name: str) -> str:
    """Frames behind a slider, as HTML that needs neither a kernel nor a network.

    A frame is a figure, which is closed, and what it shows, in words; `name` is unique on the page.
    """
    blocks = [
        picture(figure, words, f'data-value="{value}"{" hidden" if index else ""}')
        for index, (value, (figure, words)) in enumerate(frames.items())
    ]
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

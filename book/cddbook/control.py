"""The live control of chapter 5: a slider that distils with the segment count where it rests."""

import asyncio
import contextlib
import contextvars
import html
import signal
from collections.abc import Callable

import ipywidgets
from matplotlib.figure import Figure

from cddbook.figures.style import picture
from cddlib.runtime.errors import UserError


def live_slider(show: Callable[[int], tuple[Figure, str]], *, label: str, value: int, most: int) -> ipywidgets.VBox:
    """A slider from 1 to `most` in Jupyter, first at `value`, over the figure that `show` makes of its value.

    Jupyter tells a change at once, while a cell runs too, but in another thread than that of cells, which no signal
    reaches. So the change is announced there, and `show` is called where cells run: it waits for a running cell, the
    stop button stops it, and values that the slider has left by then are passed over. It returns a figure, which is
    closed, and its caption; `UserError` and an interruption become a sentence.
    """
    slider = ipywidgets.IntSlider(value, min=1, max=most, description=label, continuous_update=False)
    shown, bars = ipywidgets.HTML(), ipywidgets.Output()
    kernel, cell = asyncio.get_running_loop(), contextvars.copy_context()  # so that `bars` get what `show` prints
    results: dict[int, str] = {}

    def say(words: str) -> None:
        shown.value = f'<p role="status">{html.escape(words)}</p>'

    def announce(_change: object) -> None:
        say(f"{label} = {slider.value}: waiting until the kernel is free.")
        kernel.call_soon_threadsafe(update, context=cell)

    def update(capture: ipywidgets.Output | None = bars) -> None:
        chosen, before = slider.value, signal.signal(signal.SIGINT, signal.default_int_handler)
        with capture or contextlib.nullcontext():
            try:
                if chosen not in results:
                    say(f"{label} = {chosen}: at work. Jupyter's stop button stops it.")
                    results[chosen] = picture(*show(chosen))
                if slider.value == chosen:
                    shown.value = results[chosen]
            except UserError as error:
                say(f"{label} = {chosen}: {error}")
            except KeyboardInterrupt as stop:
                say(f"{label} = {chosen}: {str(stop) or 'stopped'}. To go on, move the slider away and back.")
            if capture:
                capture.clear_output()
        signal.signal(signal.SIGINT, before)

    slider.observe(announce, "value")
    update(None)  # prints into the cell: nbclient can wait for ever for one whose output a widget captures
    return ipywidgets.VBox([slider, bars, shown])

"""The live slider shows the value where it rests, waits for the kernel, and can be stopped."""

import asyncio
import functools
import signal
import threading
from collections.abc import Awaitable, Callable
from unittest.mock import Mock, patch

import ipywidgets
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from cddbook.control import live_slider
from cddlib.runtime.distributed import Interrupted
from cddlib.runtime.errors import UserError


class Session:
    """A kernel's main thread, in which `show` runs, and the slider's values, which come from another one."""

    def __init__(self, show: Callable[[int], str]) -> None:
        self.shown: list[int] = []
        self.show = show
        control = live_slider(self._show, label="K", value=4, most=8)
        self.slider, _, self.caption = control.children
        assert isinstance(self.slider, ipywidgets.IntSlider)

    def _show(self, value: int) -> tuple[Figure, str]:
        assert threading.current_thread() is threading.main_thread()
        self.shown.append(value)
        return plt.figure(figsize=(1, 1)), self.show(value)

    async def turn(self, *values: int) -> None:
        """Move the slider while the main thread is busy, then leave that thread free."""
        mover = threading.Thread(target=lambda: [setattr(self.slider, "value", value) for value in values])
        mover.start()
        mover.join()
        self.waiting = self.caption.value
        await asyncio.sleep(0.01)


def in_a_kernel(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that runs as Jupyter runs cells: in an event loop of the main thread."""
    return functools.wraps(test)(lambda **arguments: asyncio.run(test(**arguments)))


@in_a_kernel
async def test_only_the_last_value_is_shown_and_it_is_announced() -> None:
    with patch.object(ipywidgets.Output, "__enter__", side_effect=AssertionError):  # on which nbclient can hang
        session = Session("images of {}".format)
    assert session.shown == [4] and "images of 4" in session.caption.value
    await session.turn(5, 6, 7)
    assert session.shown == [4, 7]
    assert "K = 7: waiting until the kernel is free." in session.waiting
    assert "images of 7" in session.caption.value and "<img" in session.caption.value
    await session.turn(6, 7)
    assert session.shown == [4, 7] and "images of 7" in session.caption.value


@in_a_kernel
async def test_a_value_that_the_slider_left_meanwhile_is_not_shown() -> None:
    session = Session("images of {}".format)

    def move(value: int) -> str:
        if value == 5:
            mover = threading.Thread(target=lambda: setattr(session.slider, "value", 6))
            mover.start()
            mover.join()
        return f"images of {value}"

    session.show = move
    await session.turn(5)
    assert session.shown == [4, 5, 6] and "images of 6" in session.caption.value


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("segments is 9; too many."), "K = 5: segments is 9; too many."),
        (Interrupted("stopped after iteration 3, which is saved"), "K = 5: stopped after iteration 3, which is saved."),
    ],
)
@in_a_kernel
async def test_a_refusal_and_a_stop_are_a_sentence_and_the_value_can_be_chosen_again(error, said) -> None:
    session = Session("images of {}".format)
    session.show = Mock(side_effect=error)
    await session.turn(5)
    assert said in session.caption.value
    session.show = "images of {}".format
    await session.turn(4, 5)
    assert "images of 5" in session.caption.value


@in_a_kernel
async def test_the_stop_button_reaches_a_run_and_nothing_else() -> None:
    """Jupyter stops with SIGINT, which an idle kernel ignores."""
    idle = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        session = Session("images of {}".format)
        session.show = lambda value: signal.raise_signal(signal.SIGINT) or "nothing"
        await session.turn(5)
        assert "K = 5: stopped. To go on" in session.caption.value
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, idle)

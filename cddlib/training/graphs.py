"""A function of tensors as one CUDA graph: captured once, then replayed without its Python and its launches.

A student's walk launches thousands of small kernels, which take longer to launch than to run. A graph launches them
all at once, and the walks of several students, which do not depend on each other, run in parallel in it (`branches`).
"""

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UP = 2
"""Plain calls before the capture, which compile, choose algorithms and create the libraries' handles."""

_CAPTURING = threading.Lock()
"""Only one thread captures at a time."""


def graph(device: torch.device, build: Callable[..., Callable[..., Any]], *arguments: Any, key: Any = None) -> "Graph":
    """The function `build(*arguments)` of tensors on a GPU as a graph. Each thread has its own; the latest 16 are kept.

    The arguments and the `key` are hashable, and say what the function's course, shapes and types depend on.
    """
    return _LATEST.graph(device, build, arguments, key)


@functools.cache
def capture_streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    """Streams that only captures use, one capture at a time: of high priority, which no other work has."""
    return tuple(torch.cuda.Stream(device, -1) for _ in range(count))


class Graph:
    """A function of tensors on a GPU; all calls have arguments of the same shapes.

    The function may not copy between GPU and CPU, and its course may not depend on numbers on the GPU.
    """

    def __init__(
        self, device: torch.device, build: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...], key: Any
    ) -> None:
        """See `graph`. The first call builds the function and captures the graph."""
        self._device, self._build = device, functools.partial(build, *arguments)
        self._captured: tuple[torch.cuda.CUDAGraph, list[Tensor], tuple[Tensor, ...]] | None = None

    @torch.no_grad()
    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """The function's results."""
        if self._captured is None:
            with _CAPTURING, torch.cuda.device(self._device):  # streams belong to a device
                self._captured = self._capture(arguments)
        graph, static, results = self._captured
        for buffer, argument in zip(static, arguments, strict=True):
            buffer.copy_(argument)
        graph.replay()
        return tuple(result.clone() for result in results)

    def _capture(self, arguments: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], tuple[Tensor, ...]]:
        """The graph, and the static tensors that it reads and writes."""
        static, function = [argument.clone() for argument in arguments], self._build()
        here, (aside,) = torch.cuda.current_stream(), capture_streams(self._device, 1)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                function(*static)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with _no_garbage_collected(), torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            results = function(*static)
        return graph, static, results


class _Latest(threading.local):
    """A thread's latest graphs; they go when it ends."""

    def __init__(self) -> None:
        self.graph = functools.lru_cache(maxsize=16)(Graph)


_LATEST = _Latest()


@contextlib.contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Within, no kernel or graph is unloaded, which would spoil the capture."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        (gc.enable if collecting else gc.disable)()


def branches(
    function: Callable[..., tuple[Tensor, ...]], streams: Sequence[torch.cuda.Stream], *stacked: Tensor
) -> tuple[Tensor, ...]:
    """`function` of each row of `stacked`, which keeps its leading axis of length 1, on its own stream; all results."""
    here = torch.cuda.current_stream()
    results = []
    for row, stream in enumerate(streams):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            results.append(function(*(tensor[row : row + 1] for tensor in stacked)))
    for stream in streams:
        here.wait_stream(stream)
    return tuple(torch.cat(rows) for rows in zip(*results, strict=True))

"""A function of tensors as one CUDA graph: captured once, then replayed without its Python and its launches.

A student's walk makes thousands of small launches, which take longer to start than to run. A graph starts them
all at once, and the parts of the work that do not depend on each other, as the walks of several students do, run beside
each other in it (`branches`).
"""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 2
"""Plain calls before the capture: they compile, choose algorithms and create the libraries' handles."""

_CAPTURING = threading.Lock()
"""Of all threads one captures at a time."""


class Graph:
    """`function` of tensors on a GPU; every call has arguments of the shapes of the first.

    The function may not copy from or to the CPU, nor may its course depend on numbers on the GPU.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        """A graph that the first call captures."""
        self._function = function
        self._captured: tuple[torch.cuda.CUDAGraph, list[Tensor], tuple[Tensor, ...]] | None = None

    @torch.no_grad()
    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """The function's results."""
        if self._captured is None:
            with _CAPTURING:
                self._captured = self._capture(arguments)
        graph, own, results = self._captured
        for mine, given in zip(own, arguments, strict=True):
            mine.copy_(given)
        graph.replay()
        return tuple(result.clone() for result in results)

    def _capture(self, arguments: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], tuple[Tensor, ...]]:
        """The graph, and the tensors that it reads and writes."""
        own = [argument.clone() for argument in arguments]
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._function(*own)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            results = self._function(*own)
        return graph, own, results


def branches(
    function: Callable[..., tuple[Tensor, ...]], streams: Sequence[torch.cuda.Stream], *stacked: Tensor
) -> tuple[Tensor, ...]:
    """`function` of each row of `stacked`, a stream for each: its results, a row each, of tensors with one row."""
    here = torch.cuda.current_stream()
    found = []
    for row, stream in enumerate(streams):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            found.append(function(*(tensor[row : row + 1] for tensor in stacked)))
    for stream in streams:
        here.wait_stream(stream)
    return tuple(torch.cat(rows) for rows in zip(*found, strict=True))

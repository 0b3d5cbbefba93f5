"""A function of tensors as one CUDA graph: captured once, then replayed without its Python and its launches.

A student's walk launches thousands of small kernels, which take longer to launch than to run. A graph launches them
all at once, and the walks of several students, which do not depend on each other, run in parallel in it (`branches`).
"""

import functools
import threading
from collections.abc import Callable, Sequence
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
    return _graph(device, threading.get_ident(), build, arguments, key)


@functools.lru_cache(maxsize=16)
def _graph(
    device: torch.device, thread: int, build: Callable[..., Any], arguments: tuple[Any, ...], key: Any
) -> "Graph":
    return Graph(build(*arguments), device)


class Graph:
    """`function` of tensors on the GPU `device`; all calls have arguments of the same shapes.

    The function may not copy between GPU and CPU, and its course may not depend on numbers on the GPU.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], device: torch.device) -> None:
        """The first call captures the graph."""
        self._function, self._device = function, device
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
        static = [argument.clone() for argument in arguments]
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._function(*static)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            results = self._function(*static)
        return graph, static, results


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

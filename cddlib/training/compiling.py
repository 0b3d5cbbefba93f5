"""Compiling functions of tensors, where there is a compiler."""

import functools
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch

from cddlib.runtime.distributed import Ranks
from cddlib.runtime.errors import UserError, is_out_of_memory

OPTIONS: dict[str, Any] = {"combo_kernels": True, "split_reductions": False, "realize_reads_threshold": 16}
"""Options of the compiler: fewer and larger kernels, since a GPU's time for a small step grows with their number, and
fewer intermediate results in memory."""
MOST_SHAPES = 256
"""Most batch shapes that one process compiles."""


def compile_function(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """`function`, compiled for each shape of its second argument, a batch of images or the residuals of its blocks.

    PyTorch keeps compiled code on disk for other processes. If it cannot compile on a CPU, the function runs as it is.
    """
    faster = torch.compile(function, fullgraph=True, dynamic=False, options=OPTIONS)
    known: dict[torch.Size, Callable[..., Any]] = {}

    def run(*arguments: Any) -> Any:
        batch = arguments[1][0][0] if isinstance(arguments[1], list) else arguments[1]
        if batch.shape in known:
            return known[batch.shape](*arguments)
        progress = Ranks().progress(total=1, desc=f"compiling {what} for batches of {len(batch)}", leave=False)
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES), progress:
            try:
                result = faster(*arguments)
                known[batch.shape] = faster
                progress.update()
                return result
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                reason = f"PyTorch cannot compile here ({' '.join(str(error).split())[:200]})"
                if arguments[0].is_cuda:  # uncompiled steps take much longer, and a GPU's time is expensive
                    raise UserError(f"{reason}; --compiled False does without.") from error
                not_compiled(reason)
        known[batch.shape] = function
        return function(*arguments)

    return run


@functools.cache
def can_compile() -> bool:
    """Whether there is a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "c++"))


@functools.cache
def not_compiled(reason: str) -> None:
    """Say once why steps are not compiled."""
    print(f"{reason}: steps run uncompiled, which takes longer.", file=sys.stderr)

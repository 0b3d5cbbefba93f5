"""Errors that the user can mend, and the ways in which others become one."""

import contextlib
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class UserError(Exception):
    """Something the user can mend. The message is one sentence that names the value and what is allowed."""


class Diverged(UserError):
    """The numbers of a run are no longer usable."""


Number = float | int | None


def require(
    least: Number = None, *, above: Number = None, most: Number = None, below: Number = None, **values: Number
) -> None:
    """Raise `UserError` for one of the `values` that is outside the limits. None is no value, and no limit."""
    limits: list[tuple[Any, ...]] = [(least, operator.ge, "at least"), (above, operator.gt, "above")]
    limits += [(most, operator.le, "at most"), (below, operator.lt, "below")]
    limits = [limit for limit in limits if limit[0] is not None]
    allowed = " and ".join(f"{word} {limit}" for limit, _, word in limits)
    for name, value in values.items():
        if value is not None and not all(holds(value, limit) for limit, holds, _ in limits):
            raise UserError(f"{name} is {value}; it must be {allowed}.")


@contextlib.contextmanager
def needing(what: str, package: str) -> Iterator[None]:
    """Within, a package that is not installed is a `UserError`: `what` needs `package`, a `name` or `name[extra]`."""
    try:
        yield
    except ModuleNotFoundError:
        name = package.partition("[")[0]
        raise UserError(f'{what} needs the package {name}; install it with `pip install "{package}"`.') from None


_OUT_OF_MEMORY = re.compile(
    "an.t allocate memory|annot allocate memory|bad_alloc|could not create a primitive$|can't start new thread"
    "|^error return without exception set$"
)
"""How the system, PyTorch, C++, oneDNN, Python and Pillow say that memory ran out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(_OUT_OF_MEMORY.search(str(error)))


@contextlib.contextmanager
def as_user_error(source: Path, what: str) -> Iterator[None]:
    """Within, a value of `source` that is missing or of another type ends in a `UserError`: it is not `what`."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise UserError(f"{source} is not {what} ({reason}).") from None


@contextlib.contextmanager
def out_of_memory_hint(settings: str) -> Iterator[None]:
    """Turn a want of memory inside into a `UserError` that names the `settings` to lower; also a decorator."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"there is not enough memory ({reason}); lower {settings}, in another folder, or go on with the same "
            f"command where there is more: what was saved is kept."
        ) from None

"""Recipes: a complete configuration for every (method, data set, IPC), put together from `cddlib.methods.catalogue`.

On the command line::

    cddlib recipes --data cifar10                                       # all of them, with where the values are from
    cddlib distill --method datm --data cifar100 --ipc 10 --segments 4 --buffer runs/buffer --out runs/datm

A recipe is the base's recipe, then the method's settings, then its row for the cell. A cell without a row of its own
is *derived*: from the row, of the method or its bases, whose IPC is nearest. `segments=K` makes any method concurrent,
in a window at least K wide.
"""

import functools
import types
import typing
from typing import Any, NamedTuple

from cddlib.data.dataset import check_data_name
from cddlib.distillation.config import DistillConfig
from cddlib.experts.config import BufferConfig
from cddlib.methods.catalogue import METHODS, Kind, Method
from cddlib.runtime.config import check_types, configure, field_types
from cddlib.runtime.errors import UserError

CELLS = {
    "digits": (1, 10, 50),
    "fashion_mnist": (1, 10, 50),
    "cifar10": (1, 10, 50, 500, 1000),
    "cifar100": (1, 10, 50, 100),
    "tiny_imagenet": (1, 10, 50),
    "imagenet": (1, 10, 50),
}
"""Images per class in the tables of the field, and for the two small data sets."""

_DATA: dict[str, dict[str, Any]] = {  # what experts and students of a data set have in common, and its experts
    "digits": {
        "depth": 2,
        "width": 32,
        "augment": "crop_scale_rotate",
        "experts": 5,
        "epochs": 20,
        "learning_rate": 0.1,
        "batch_size": 64,
    },
    "cifar10": {"zca": True},
    "cifar100": {"zca": True},
    "tiny_imagenet": {"depth": 4},
    "imagefolder": {"depth": 4},
    "imagenet": {"depth": 4},
}


_STAND_IN = {"imagefolder": "tiny_imagenet", "imagenet": "tiny_imagenet"}
"""Data sets whose values a method takes for one that neither it nor its bases have rows for; without their ZCA."""


class Source(NamedTuple):
    """Where a recipe's values are from."""

    kind: Kind
    text: str


def distill_recipe(method: str = "contra", data: str = "digits", ipc: int = 1, **overrides: Any) -> DistillConfig:
    """The configuration of `method` for `ipc` images per class of `data`.

    Any field of `DistillConfig` can be given as a keyword.

    Raises:
        UserError: unknown method or data set, or values that do not fit together.
    """
    _refuse_types(DistillConfig, {**overrides, "ipc": ipc})
    values = {**_values(method, data, ipc, DistillConfig), "method": method, "ipc": ipc}
    values["subsets"] = min(values.get("subsets", 1), max(ipc, 1))
    values |= overrides
    if "window_end" not in overrides:
        least = values.get("window_start", 0) + values.get("segments", 1) * values["subsets"]
        for name in ("window_end", "window_end_initial"):
            if values.get(name) is not None:
                values[name] = max(values[name], least)
    return configure(DistillConfig, **values)


def buffer_recipe(data: str, method: str = "mtt", ipc: int = 1, **overrides: Any) -> BufferConfig:
    """How `method` trains experts on `data`, for `ipc` synthetic images per class; MTT's experts if none is named.

    Any field of `BufferConfig` can be given as a keyword.

    Raises:
        UserError: unknown method or data set, or values that do not fit together.
    """
    _refuse_types(BufferConfig, overrides)
    return configure(BufferConfig, **{**_values(method, data, ipc, BufferConfig), **overrides})


def _refuse_types(config_type: type, values: dict[str, Any]) -> None:
    """Raise `UserError` for a name that is no field or a value of another type: a notebook's can be anything."""
    unknown = sorted(values.keys() - field_types(config_type).keys())
    if unknown:
        raise UserError(f"{unknown[0]!r} is not a field of {config_type.__name__}.")
    try:
        check_types(config_type, values)
    except TypeError as error:
        raise UserError(f"{error}.") from None


def source(method: str, data: str, ipc: int) -> Source:
    """Where the values of a recipe are from."""
    return _resolve(_method(method), data, ipc)[1]


def _lineage(method: Method | None) -> list[Method]:
    """The method, its base, its base's base …"""
    return [] if method is None else [method, *_lineage(method.base)]


def recipes_table(method: str | None = None, data: str | None = None) -> str:
    """The recipes of one or all methods on one or all data sets, as a table in Markdown.

    Raises:
        UserError: unknown method or data set.
    """
    methods = list(METHODS) if method is None else [_method(method).name]
    if data is not None and data not in CELLS:
        raise UserError(f"data is {data!r}; there are recipes for {', '.join(CELLS)}.")
    rows = [_row(m, d, ipc) for m in methods for d in (CELLS if data is None else [data]) for ipc in CELLS[d]]
    widths = [max(len(line[column]) for line in [_HEADER, *rows]) for column in range(len(_HEADER))]
    lines = [_HEADER, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


_HEADER = ["method", "data", "IPC", "K", "M", "N", "batch", "window", "iterations", "lr images", "lr labels", "lr α"]
_HEADER += ["α", "ZCA", "experts", "values"]


def _row(method: str, data: str, ipc: int) -> list[str]:
    c, experts = distill_recipe(method, data, ipc), buffer_recipe(data, method, ipc)
    schedule, optimizer, labels = c.schedule, c.optimizer, c.synthetic.labels
    growing = "" if schedule.window_end_initial is None else f"{schedule.window_end_initial}→"
    cells = (
        *(method, data, ipc, schedule.segments, schedule.expert_epochs, c.student.student_steps),
        c.student.student_batch or "all",
        *(f"[{schedule.window_start}, {growing}{schedule.window_end})", schedule.iterations),
        *(f"{optimizer.lr_images:g}", f"{optimizer.lr_labels:g}" if labels == "learned" else labels),
        *(f"{optimizer.lr_step_size:g}", f"{c.synthetic.step_size:g}", "yes" if c.data.zca else "no"),
        *(f"{experts.experts} of {experts.epochs}", ": ".join(source(method, data, ipc))),
    )
    return [str(cell) for cell in cells]


def _method(name: str) -> Method:
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[name]


def _values(method: str, data: str, ipc: int, config_type: type) -> dict[str, Any]:
    """The recipe's values for the fields of `config_type`."""
    check_data_name(data)
    values = {"data": data, **_DATA.get(data, {}), **_resolve(_method(method), data, ipc)[0]}
    return {name: value for name, value in values.items() if name in field_types(config_type)}


def _resolve(method: Method, data: str, ipc: int) -> tuple[dict[str, Any], Source]:
    """The recipe's values, and their source."""
    lineage = _lineage(method)
    known = data if any(_rows(m, data) for m in lineage) else _STAND_IN[data]
    values: dict[str, Any] = {}
    origin = Source("derived", "")
    for m in reversed(lineage):
        values |= m.settings
        rows = _rows(m, known)
        nearest = min(rows, key=lambda row_ipc: abs(row_ipc - ipc), default=None)
        bases = [abs(row_ipc - ipc) for base in _lineage(m.base) for row_ipc in _rows(base, known)]
        if nearest is None or abs(nearest - ipc) > min(bases, default=nearest + ipc):
            continue
        row, kind = rows[nearest]
        values |= row
        origin = Source(kind, "a search recorded in book/results" if kind == "searched" else m.source)
        if m is not method or (known, nearest) != (data, ipc):
            origin = Source("derived", f"{m.name}'s values for {known}, IPC {nearest}")
    if known != data:
        values.pop("zca", None)
    return values, origin


@functools.cache
def _rows(method: Method, data: str) -> dict[int, tuple[dict[str, Any], Kind]]:
    """The method's rows for a data set, by IPC."""
    found: dict[int, tuple[dict[str, Any], Kind]] = {}
    tables: tuple[tuple[Kind, str], ...] = ((method.kind, method.cells), ("searched", method.searched))
    for kind, table in tables:
        lines = [line.split() for line in table.strip().splitlines()]
        for name, ipc, *tokens in lines[1:]:
            if name == data:
                columns = zip(lines[0][2:], tokens, strict=True)
                found[int(ipc)] = {field: _parse(field, token) for field, token in columns if token != "-"}, kind
    return found


def _parse(field: str, token: str) -> Any:
    """The value that `token` stands for in the column `field`."""
    kind = (field_types(BufferConfig) | field_types(DistillConfig))[field]
    if isinstance(kind, types.UnionType):
        if token == "none":
            return None
        kind = kind.__args__[0]
    if kind is bool:
        return {"true": True, "false": False}[token]
    if typing.get_origin(kind) is tuple:
        return tuple(kind.__args__[0](part) for part in token.split(","))
    return kind(token) if kind in (int, float) else token

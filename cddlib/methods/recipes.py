"""Recipes: a complete configuration for every (method, data set, IPC), put together from `cddlib.methods.catalogue`.

On the command line::

    cddlib recipes --data cifar10                                       # all of them, with where the values are from
    cddlib distill --method datm --data cifar100 --ipc 10 --segments 4 --buffer runs/buffer --out runs/datm

A recipe begins with the data set's line of `data_sets.csv`. Then come the base's recipe, the method's settings, and its
row of `cells.csv` for the (data set, IPC). Where it has no row, the values are *derived*: taken from the row, of the
method or its bases, whose IPC is nearest, and what that row leaves open from the method's own nearest one.
`segments=K` makes any method concurrent, in a window at least K wide.
"""

import csv
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cddlib.data.dataset import check_data_name
from cddlib.distillation.config import DistillConfig
from cddlib.experts.config import BufferConfig
from cddlib.methods.catalogue import METHODS
from cddlib.runtime.config import check_types, configure, field_types
from cddlib.runtime.errors import UserError, require

CELLS = {
    "digits": (1, 10, 50),
    "fashion_mnist": (1, 10, 50),
    "cifar10": (1, 10, 50, 500, 1000),
    "cifar100": (1, 10, 50, 100),
    "tiny_imagenet": (1, 10, 50),
    "imagenet": (1, 10, 50),
}
"""Images per class in the tables of the field, and for the two small data sets."""

_STAND_IN = {"imagefolder": "tiny_imagenet", "imagenet": "tiny_imagenet"}
"""Data sets whose values a method takes for one that neither it nor its bases have rows for; without their ZCA."""

Kind = Literal["published", "searched", "derived"]
"""Whether values are the authors', were found by search (recorded in `book/results`), or come from another cell."""


class Row(NamedTuple):
    """A method's own values for one (data set, IPC)."""

    kind: Kind
    values: dict[str, Any]


def distill_recipe(method: str = "contra", data: str = "digits", ipc: int = 1, **overrides: Any) -> DistillConfig:
    """The configuration of `method` for `ipc` images per class of `data`.

    Any field of `DistillConfig` can be given as a keyword.

    Raises:
        UserError: unknown method or data set, or values that do not fit together.
    """
    values = _values(DistillConfig, method, data, ipc, {"ipc": ipc, **overrides, "method": method})
    if "subsets" not in overrides:
        values["subsets"] = min(values.get("subsets", 1), ipc)
    if "window_end" not in overrides:
        least = values.get("window_start", 0) + values.get("segments", 1) * values["subsets"]
        for name in ("window_end", "window_end_initial"):
            if values.get(name) is not None:
                values[name] = max(values[name], least)
    return configure(DistillConfig, **values)


def buffer_recipe(data: str = "digits", method: str = "mtt", ipc: int = 1, **overrides: Any) -> BufferConfig:
    """How `method` trains experts on `data`, for `ipc` synthetic images per class; MTT's experts if none is named.

    Any field of `BufferConfig` can be given as a keyword.

    Raises:
        UserError: unknown method or data set, or values that do not fit together.
    """
    return configure(BufferConfig, **_values(BufferConfig, method, data, ipc, overrides))


def recipes_table(method: str | None = None, data: str | None = None) -> str:
    """The recipes of one or all methods on one or all data sets, as a table in Markdown.

    Raises:
        UserError: unknown method or data set.
    """
    if data is not None and data not in CELLS:
        raise UserError(f"data is {data!r}; there are recipes for {', '.join(CELLS)}.")
    methods, cells = [method] if method else METHODS, [data] if data else CELLS
    rows = [_row(m, d, ipc) for m in methods for d in cells for ipc in CELLS[d]]
    lines = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def _row(method: str, data: str, ipc: int) -> dict[str, object]:
    """A recipe's line in the table, by column."""
    c, experts = distill_recipe(method, data, ipc), buffer_recipe(data, method, ipc)
    schedule, optimizer, labels = c.schedule, c.optimizer, c.synthetic.labels
    growing = "" if schedule.window_end_initial is None else f"{schedule.window_end_initial}→"
    return {
        "method": method,
        "data": data,
        "IPC": ipc,
        "K": schedule.segments,
        "M": schedule.expert_epochs,
        "N": c.student.student_steps,
        "batch": c.student.student_batch or "all",
        "window": f"[{schedule.window_start}, {growing}{schedule.window_end})",
        "iterations": schedule.iterations,
        "lr images": f"{optimizer.lr_images:g}",
        "lr labels": f"{optimizer.lr_labels:g}" if labels == "learned" else labels,
        "lr α": f"{optimizer.lr_step_size:g}",
        "α": f"{c.synthetic.step_size:g}",
        "ZCA": "yes" if c.data.zca else "no",
        "experts": f"{experts.experts} of {experts.epochs}",
        "values": ": ".join(resolve(method, data, ipc)[1]),
    }


def _values(config_type: type, method: str, data: str, ipc: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """The recipe's values for the fields of `config_type`, and the overrides, which may be anything in a notebook."""
    fields = field_types(config_type)
    if unknown := sorted(overrides.keys() - fields.keys()):
        raise UserError(f"{unknown[0]!r} is not a field of {config_type.__name__}.")
    try:
        check_types(config_type, overrides)
    except TypeError as error:
        raise UserError(f"{error}.") from None
    check_data_name(data)
    require(1, ipc=ipc)
    values = {"data": data, **_DATA.get(data, {}), **resolve(method, data, ipc)[0]}
    return {name: value for name, value in values.items() if name in fields} | overrides


def resolve(method: str, data: str, ipc: int) -> tuple[dict[str, Any], tuple[Kind, str]]:
    """The recipe's values, and where they are from: the kind, and in words."""
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    lineage = [METHODS[method]]
    while lineage[0].base:
        lineage.insert(0, lineage[0].base)
    names = {m.name for m in lineage}
    known = data if any(name in names and of == data for name, of, _ in ROWS) else _STAND_IN[data]
    values: dict[str, Any] = {}
    origin: tuple[Kind, str] = "derived", ""
    closest, decided = math.inf, set[str]()  # how far the IPC of the nearest row is from the one wanted, and its fields
    for m in lineage:
        values |= m.settings
        rows = {of_ipc: row for (name, of, of_ipc), row in ROWS.items() if (name, of) == (m.name, known)}
        if not rows:
            continue
        nearest = min(rows, key=lambda row_ipc: abs(row_ipc - ipc))
        distance, (kind, own) = abs(nearest - ipc), rows[nearest]
        if distance > closest:  # a base has a nearer row: this one only fills in what that leaves open
            own = {name: value for name, value in own.items() if name not in decided}
        else:
            closest, decided = distance, decided | own.keys()
            origin = "derived", f"{m.name}'s values for {known}, IPC {nearest}"
            if (m.name, known, nearest) == (method, data, ipc):
                origin = kind, "a search recorded in book/results" if kind == "searched" else m.source
        values |= own
    if known != data:
        values.pop("zca", None)
    return values, origin


def read_rows(lines: Iterable[str]) -> dict[tuple[str, str, int], Row]:
    """The lines of a CSV file that has the form of `cells.csv`, by method, data set and IPC.

    The first line names the columns: method, data, ipc, kind, and then fields of `DistillConfig` and `BufferConfig`.
    An empty value leaves the base's; `none` stands for None.
    """
    rows = {}
    for line in csv.DictReader(lines):
        method, data, ipc, kind = (line.pop(column) for column in ("method", "data", "ipc", "kind"))
        rows[method, data, int(ipc)] = Row(typing.cast(Kind, kind), _parse_line(line))
    return rows


def parse_value(field: str, token: str) -> Any:
    """The value that `token` stands for in a configuration's `field`.

    Raises:
        KeyError: no configuration has the field, or it is a switch and `token` neither true nor false.
        ValueError: `token` is no number, where the field is one.
    """
    kind = _FIELDS[field]
    if isinstance(kind, types.UnionType):
        if token == "none":
            return None
        kind = kind.__args__[0]
    if kind is bool:
        return {"true": True, "false": False}[token]
    return kind(token) if kind in (int, float) else token


def _read(name: str) -> list[str]:
    return Path(__file__).with_name(name).read_text().splitlines()


def _parse_line(line: dict[str, str]) -> dict[str, Any]:
    return {field: parse_value(field, token) for field, token in line.items() if token}


_FIELDS = field_types(BufferConfig) | field_types(DistillConfig)
ROWS = read_rows(_read("cells.csv"))
"""The values of every (method, data set, IPC) that has some of its own."""
_DATA = {line.pop("data"): _parse_line(line) for line in csv.DictReader(_read("data_sets.csv"))}
"""What experts and students of a data set have in common, and its experts, where no method says otherwise."""

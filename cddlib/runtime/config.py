"""Configurations: dataclasses to JSON and back, with types checked, and a name for each."""

import dataclasses
import functools
import hashlib
import json
import reprlib
import types
import typing
from typing import Any, Literal, TypeVar, cast

T = TypeVar("T")


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_hash(config: dict[str, Any]) -> str:
    """Twelve hex digits that name a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def from_dict(config_type: type[T], values: dict[str, Any]) -> T:
    """The `config_type` among the JSON `values`, which may hold more.

    Raises:
        KeyError: a field is missing.
        TypeError: a field has a value of another type.
    """
    found = {field.name: values[field.name] for field in dataclasses.fields(cast(Any, config_type))}
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}  # JSON has lists
    check_types(config_type, found)
    return config_type(**found)


def check_types(config_type: type, values: dict[str, Any]) -> None:
    """Raise `TypeError` for a value that the field of its name in `config_type` cannot have."""
    kinds = _kinds(config_type)
    for name in values.keys() & kinds.keys():
        if not _fits(values[name], kinds[name]):
            kind = kinds[name].__name__ if isinstance(kinds[name], type) else str(kinds[name]).removeprefix("typing.")
            raise TypeError(f"{name} is {reprlib.repr(values[name])}, which is not of type {kind}")


_kinds = functools.cache(typing.get_type_hints)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a configuration's field of type `kind` can have a value."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in parts
    if origin is types.UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        several = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(value) == len(several) and all(map(_fits, value, several))
    if type(value) is int:  # which a bool is not
        return kind in (int, float) and abs(value) < 2**63
    return type(value) is kind

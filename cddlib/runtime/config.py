"""Configurations: frozen dataclasses, composed of sections, that are one flat table on disk and on the command line.

A section is a dataclass beside the code that reads it, and a field of the configurations that it belongs to. The names
of fields are unique among all sections of a configuration, so a file, a flag and `replace` need no other address.
"""

import dataclasses
import hashlib
import inspect
import json
import reprlib
import types
import typing
from typing import Any, Literal, TypeVar, cast

T = TypeVar("T")


def field_types(kind: Any) -> dict[str, Any]:
    """The type of every field of a configuration, by name; a section counts by its own fields."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        found |= field_types(hint) if dataclasses.is_dataclass(hint) else {name: hint}
    return found


def flat(config: Any) -> dict[str, Any]:
    """The value of every field, by name."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def configure(kind: type[T], /, **values: Any) -> T:
    """The configuration of that kind with these values; a field that is not given has its default.

    Raises:
        UserError: values that a section refuses.
        TypeError: a name that is no field.
    """
    own: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            fields, section = field_types(hint), cast(type, hint)
            own[name] = configure(section, **{key: values.pop(key) for key in fields if key in values})
        elif name in values:
            value = values.pop(name)  # a whole number is written like a real one, where either may stand
            own[name] = float(value) if type(value) is int and _has_type(0.5, hint) else value
    return kind(**own, **values)


def replace(config: T, /, **values: Any) -> T:
    """The same configuration with other values for some fields, whatever section they belong to."""
    return configure(type(config), **{**flat(config), **values})


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values, by field."""
    return json.loads(json.dumps(flat(config)))


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """The configuration of that kind among the JSON `values`, which may hold more.

    Raises:
        KeyError: a field is missing.
        TypeError: a field has a value of another type.
    """
    found = {name: values[name] for name in field_types(kind)}
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}  # JSON has lists
    check_types(kind, found)
    return configure(kind, **found)


def config_hash(config: dict[str, Any]) -> str:
    """Twelve hex digits that name a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def check_types(kind: Any, values: dict[str, Any]) -> None:
    """Raise `TypeError` for a value that the field of its name cannot have."""
    hints = field_types(kind)
    for name in values.keys() & hints.keys():
        if not _has_type(values[name], hints[name]):
            wanted = inspect.formatannotation(hints[name])
            raise TypeError(f"{name} is {reprlib.repr(values[name])}, which is not of type {wanted}")


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a field of the type `hint` can have a value."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in parts
    if origin is types.UnionType:
        return any(_has_type(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        several = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(value) == len(several) and all(map(_has_type, value, several))
    if type(value) is int:  # which a bool is not
        return hint in (int, float) and abs(value) < 2**63
    return type(value) is hint

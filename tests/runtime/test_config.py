"""Configurations: sections that are one flat table, whichever way they are made, changed and written."""

import dataclasses
import json
from typing import Any, Literal

import hypothesis
import hypothesis.strategies as st
import pytest

import cddlib
from cddlib.runtime import config as configs
from cddlib.runtime.config import as_dict, configure, field_types, from_dict, replace
from cddlib.runtime.errors import UserError, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, float] = (1, 0.5)
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Middle:
    inner: Inner = Inner()
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise UserError(f"rate is {self.rate}; it must be 0 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    middle: Middle = Middle()
    name: str
    limit: int | None = None
    flag: bool = True


whole = st.integers(-(2**63) + 1, 2**63 - 1)
real = st.floats(0, allow_nan=False)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "sizes": st.lists(whole, max_size=3).map(tuple),
    "pair": st.tuples(whole, real),
    "kind": st.sampled_from(["a", "b"]),
    "rate": real,
    "name": st.text(max_size=5),
    "limit": st.none() | whole,
    "flag": st.booleans(),
}


@hypothesis.given(values=st.fixed_dictionaries(VALUES), changes=st.fixed_dictionaries({}, optional=VALUES))
def test_a_configuration_is_the_table_of_its_fields(values: dict[str, Any], changes: dict[str, Any]) -> None:
    config = configure(Outer, **values)
    inner = Inner(sizes=values["sizes"], pair=values["pair"], kind=values["kind"])
    others = {name: values[name] for name in ("name", "limit", "flag")}
    assert config == Outer(middle=Middle(inner=inner, rate=values["rate"]), **others)
    assert as_dict(config) == json.loads(json.dumps(values))
    assert from_dict(Outer, {**as_dict(config), "more": 1}) == config
    assert replace(config, **changes) == configure(Outer, **{**values, **changes})
    assert replace(Outer(name="x"), **changes) == configure(Outer, **{"name": "x", **changes})  # the rest by default
    assert configs.flat(config) == values


def test_sections_check_their_values_and_names_are_fields() -> None:
    for make in (lambda **values: configure(Outer, name="x", **values), lambda **v: replace(Outer(name="x"), **v)):
        with pytest.raises(UserError, match=r"^rate is -1\.0; it must be 0 or more\.$"):
            make(rate=-1.0)
        with pytest.raises(TypeError, match="colour"):
            make(colour=1)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("sizes", (1, 2.5), "tuple[int, ...]"),
        ("sizes", 1, "tuple[int, ...]"),
        ("pair", (1, 2.0, 3.0), "tuple[int, float]"),
        ("kind", "c", "Literal['a', 'b']"),
        ("rate", "0.5", "float"),
        ("rate", True, "float"),
        ("name", 1, "str"),
        ("limit", 2**63, "int | None"),
        ("limit", 1.0, "int | None"),
        ("flag", 1, "bool"),
    ],
)
def test_a_value_of_another_type_is_named(name: str, value: object, kind: str) -> None:
    values = {**as_dict(Outer(name="x")), name: value}
    with pytest.raises(TypeError) as refused:
        from_dict(Outer, values)
    assert str(refused.value) == f"{name} is {value!r}, which is not of type {kind}"
    del values[name]
    with pytest.raises(KeyError, match=name):
        from_dict(Outer, values)


def test_the_hash_is_of_the_values_in_any_order() -> None:
    whole, real = (as_dict(configure(Outer, name="", rate=rate)) for rate in (1, 1.0))
    assert configs.config_hash(whole) == configs.config_hash(real)
    assert configs.config_hash({"a": 1, "b": 2}) == configs.config_hash({"b": 2, "a": 1})
    assert configs.config_hash({"a": 1}) != configs.config_hash({"a": 2})
    assert len(configs.config_hash({})) == 12


def leaves(kind: Any) -> list[str]:
    """The names of all fields, those of sections one by one."""
    return [
        name
        for field in dataclasses.fields(kind)
        for name in (leaves(field.type) if dataclasses.is_dataclass(field.type) else [field.name])
    ]


@pytest.mark.parametrize("kind", [cddlib.DistillConfig, cddlib.BufferConfig])
def test_no_two_sections_of_a_configuration_have_a_field_of_one_name(kind: Any) -> None:
    names = leaves(kind)
    assert len(names) == len(set(names)) > 20 and set(names) == field_types(kind).keys()
    config = configure(kind)
    assert from_dict(kind, as_dict(config)) == config
    assert replace(config, width=9).network.width == 9


def test_a_value_that_is_not_allowed_is_named() -> None:
    require(1, below=2, n=1, m=1.5)
    require(0, most=float("inf"), n=float("inf"))
    for limits, more in (({}, ""), ({"most": 3}, " and at most 3"), ({"below": 4}, " and below 4")):
        for value in (0, -1, float("nan"), *([4] if limits else [])):
            with pytest.raises(UserError, match=rf"^n is {value}; it must be at least 1{more}\.$"):
                require(1, **limits, m=1, n=value)

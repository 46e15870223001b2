"""Read plain values of JSON and TOML as annotated types; whatever does not fit is an error that names its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

from vlmbuild.errors import UsageError


def read_as(kind: Any, value: Any, where: str) -> Any:
    """Return a value as `kind`: dataclasses and typed dictionaries from mappings, tuples from lists, and plain types.

    Args:
        kind: Dataclass, TypedDict, `dict` or `Mapping[str, T]`, `tuple`, `Literal`, `T | None`, a plain type, or Any.
        value: What a parser returned.
        where: Place of the value, for messages: "regions.lm_head".

    Raises:
        UsageError: A value has another type, or a name is unknown or missing.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind) or is_typeddict(kind):
        return _record(kind, value, where)
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {_name(key, where): read_as(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise UsageError(f"{where} has {len(value)} values; expected {len(kinds)}")
        pairs = zip(kinds, value, strict=True)
        return tuple(read_as(item_kind, item, f"{where}[{index}]") for index, (item_kind, item) in enumerate(pairs))
    if origin is UnionType:
        (plain,) = (choice for choice in arguments if choice is not NoneType)
        return None if value is None else read_as(plain, value, where)
    if value in arguments if origin is Literal else type(value) is kind:
        return value
    expected = f"one of {', '.join(map(repr, arguments))}" if origin is Literal else getattr(kind, "__name__", kind)
    raise UsageError(f"{where} is {value!r}; expected {expected}")


def _name(key: Any, where: str) -> str:
    if type(key) is not str:
        raise UsageError(f"{where} has the name {key!r}; expected a str")
    return key


def _record(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not dict:
        raise UsageError(f"{where} is {value!r}; expected a table")
    types = get_type_hints(kind)
    if unknown := sorted(map(str, value.keys() - types.keys())):
        raise UsageError(f"{where} has {', '.join(unknown)}, which is unknown. Known: {', '.join(types)}.")
    required = set(types)
    if is_dataclass(kind):
        required = {item.name for item in fields(kind) if item.default is item.default_factory is MISSING}
    if missing := [name for name in types if name in required and name not in value]:
        raise UsageError(f"{where}: {', '.join(map(repr, missing))} is missing")
    return kind(**{name: read_as(types[name], item, f"{where}.{name}") for name, item in value.items()})

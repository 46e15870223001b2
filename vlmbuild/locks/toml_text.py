"""Readable TOML: values in their own order, multi-line text verbatim, rows on one line.

tomli-w would escape multi-line text and write every list on several lines, which changes all committed locks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class Row(dict[str, Any]):
    """A table on one line."""


def to_toml(values: Mapping[str, Any]) -> str:
    """Write tables, `Row`s, strings, integers, booleans, and lists of strings or of tables, which become rows.

    None is dropped, and so are nested empty tables.
    """
    return "\n".join(_table(values, ())).strip() + "\n"


def _table(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    plain = {key: value for key, value in values.items() if value is not None and not _is_table(value)}
    if path and (plain or (len(path) == 1 and not values)):
        yield ""
        yield f"[{'.'.join(map(_key, path))}]"
    for key, value in plain.items():
        yield f"{_key(key)} = {_value(value)}"
    for key, value in values.items():
        if _is_table(value):
            yield from _table(value, (*path, key))


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and not isinstance(value, Row)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else json.dumps(key, ensure_ascii=False)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        items = (f"{_key(key)} = {_value(item)}" for key, item in value.items() if item is not None)
        return f"{{ {', '.join(items)} }}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list | tuple):
        return _list(value)
    if "\n" in value and "'''" not in value:
        return f"'''\n{value}'''"
    return json.dumps(value, ensure_ascii=False)


def _list(items: list[Any] | tuple[Any, ...]) -> str:
    if len(items) < 2:
        return f"[{''.join(map(_value, items))}]"
    return "".join(["[\n", *(f"    {_value(item)},\n" for item in items), "]"])

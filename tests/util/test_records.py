"""Plain values are read as annotated types, or refused by the name of their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import pytest

from vlmbuild.errors import UsageError
from vlmbuild.util.records import read_as


class Row(TypedDict):
    size: int


@dataclass(frozen=True)
class Record:
    name: str
    kind: Literal["a", "b"]
    rows: Mapping[str, Row]
    pairs: tuple[tuple[int, str], ...] = ()
    more: dict[str, Any] | None = None


GOOD = {"name": "x", "kind": "a", "rows": {"r": {"size": 1}}, "pairs": [[1, "y"]], "more": {"z": [1.5]}}


def test_values_become_records():
    assert read_as(Record, GOOD, "file") == Record("x", "a", {"r": {"size": 1}}, ((1, "y"),), {"z": [1.5]})
    short = {"name": "x", "kind": "b", "rows": {}}
    assert read_as(Record, short, "file") == Record("x", "b", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "file.name is 1; expected str"),
        ({"name": None}, "file.name is None"),
        ({"kind": "c"}, "file.kind is 'c'; expected one of 'a', 'b'"),
        ({"kind": ["a"]}, "file.kind"),
        ({"rows": []}, "file.rows"),
        ({"rows": {"r": {}}}, "file.rows.r: 'size' is missing"),
        ({"rows": {"r": {"size": True}}}, "file.rows.r.size is True; expected int"),
        ({"rows": {1: {"size": 1}}}, "file.rows has the name 1"),
        ({"pairs": [[1]]}, r"file.pairs\[0\] has 1 values; expected 2"),
        ({"pairs": [[1, "y"], "ab"]}, r"file.pairs\[1\]"),
        ({"more": 3}, "file.more"),
        ({"extra": 1}, "file has extra, which is unknown"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(UsageError, match=message):
        read_as(Record, GOOD | change, "file")


def test_something_that_is_no_table():
    with pytest.raises(UsageError, match="file is 3; expected a table"):
        read_as(Record, 3, "file")

"""Diffs of graph listings that ignore the numbers of nodes, so that one more node does not change every later line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

_NUMBER = re.compile(r"%\d+")
_NODE = re.compile(r"\s+%\d+(?:: (?P<type>\S.*?))? = (?P<target>[\w.]+)\((?P<arguments>.*)\)$")
_SLOT = re.compile(r"\s+(?P<name>\S+): (?P<type>\w+\[.*?\])")
_CONTEXT = 2


@dataclass(frozen=True, slots=True)
class ListingDifference:
    """Difference of two listings.

    Attributes:
        lines: Unified diff: " ", "-" and "+" lines, "@@" between distant parts.
        widened: "aten.mul.Tensor compute[...] → f32[...]" for nodes whose dtype changed.
        changed: Operators whose arguments or shape changed.
    """

    lines: tuple[str, ...]
    widened: tuple[str, ...]
    changed: tuple[str, ...]


def compare_listings(before: str, after: str) -> ListingDifference:
    """Compare two listings with one node per line."""
    old, new = before.splitlines(), after.splitlines()
    lines: list[str] = []
    widened: dict[str, None] = {}
    changed: dict[str, None] = {}
    for group in _changed_groups(old, new):
        lines.append("@@")
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                lines += [f" {line}" for line in new[j1:j2]]
                continue
            lines += [f"-{line}" for line in old[i1:i2]] + [f"+{line}" for line in new[j1:j2]]
            for dtype, text in _node_changes(old[i1:i2], new[j1:j2]):
                (widened if dtype else changed)[text] = None
    return ListingDifference(tuple(lines[1:]), tuple(widened), tuple(changed))


def side_by_side(before: str, after: str) -> Iterator[tuple[str | None, str | None] | None]:
    """Yield pairs of lines, None where a side has no line, with two lines of context; None between distant parts."""
    old, new = before.splitlines(), after.splitlines()
    for number, group in enumerate(_changed_groups(old, new)):
        if number:
            yield None
        for _, i1, i2, j1, j2 in group:
            yield from itertools.zip_longest(old[i1:i2], new[j1:j2])


def is_equal(before: str | None, after: str | None) -> bool:
    """Return whether two lines differ at most in the numbers of nodes."""
    return before is not None and after is not None and _plain(before) == _plain(after)


def _changed_groups(old: list[str], new: list[str]) -> Iterator[list[tuple[str, int, int, int, int]]]:
    matcher = SequenceMatcher(None, [_plain(line) for line in old], [_plain(line) for line in new], autojunk=False)
    yield from matcher.get_grouped_opcodes(_CONTEXT)


def _plain(line: str) -> str:
    return _NUMBER.sub("%", line)


def _node_changes(old: list[str], new: list[str]) -> Iterator[tuple[bool, str]]:
    """Yield (whether the dtype changed, description) for nodes and slots in the same position on both sides."""
    for before, after in zip(old, new, strict=False):
        pair = [_NODE.match(line) or _SLOT.match(line) for line in (before, after)]
        if pair[0] is None or pair[1] is None or pair[0].re is not pair[1].re:
            continue
        one, other = pair[0].groupdict(), pair[1].groupdict()
        name = one.get("target") or one["name"]
        if name != (other.get("target") or other["name"]):
            continue
        types = [str(entry["type"]) for entry in (one, other)]
        if types[0].partition("[")[0] != types[1].partition("[")[0]:
            yield True, f"{name} {types[0]} → {types[1]}"
        elif types[0] != types[1]:
            yield False, f"{name} {types[0]} → {types[1]}"
        elif one.get("arguments") != other.get("arguments"):
            yield False, f"{name}({_plain(one['arguments'])}) → ({_plain(other['arguments'])})"

"""Unified diffs of graph listings that do not mind numbers: a node more does not make every later line another one."""

from __future__ import annotations

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
    """Of two listings.

    Attributes:
        lines: Unified diff: " ", "-" and "+" lines, "@@" between distant parts.
        widened: "aten.mul.Tensor: compute[...] → f32[...]" of nodes that have another dtype, and nothing else.
        changed: Operators with other arguments.
    """

    lines: tuple[str, ...]
    widened: tuple[str, ...]
    changed: tuple[str, ...]


def compare_listings(before: str, after: str) -> ListingDifference:
    """Compare two listings, one node a line."""
    old, new = before.splitlines(), after.splitlines()
    matcher = SequenceMatcher(None, [_plain(line) for line in old], [_plain(line) for line in new], autojunk=False)
    lines: list[str] = []
    widened: dict[str, None] = {}
    changed: dict[str, None] = {}
    for group in matcher.get_grouped_opcodes(_CONTEXT):
        lines.append("@@")
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                lines += [f" {line}" for line in new[j1:j2]]
                continue
            lines += [f"-{line}" for line in old[i1:i2]] + [f"+{line}" for line in new[j1:j2]]
            for dtype, text in _node_changes(old[i1:i2], new[j1:j2]):
                (widened if dtype else changed)[text] = None
    return ListingDifference(tuple(lines[1:]), tuple(widened), tuple(changed))


def _plain(line: str) -> str:
    return _NUMBER.sub("%", line)


def _node_changes(old: list[str], new: list[str]) -> Iterator[tuple[bool, str]]:
    """(whether its dtype changed, what changed) of nodes and slots that stand in the same place on both sides."""
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

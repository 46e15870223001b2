"""What got worse in a kernel table: spills, lost tensor cores, and figures beyond a threshold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from vlmbuild.locks.document import Kernels, LockedKernel

Found = tuple[Literal["cost", "cosmetic"], str, str]

THRESHOLD = 0.10
"""Share by which registers, shared memory and code may grow before it is a regression; smaller changes are cosmetic. A new
or larger spill and a lost tensor-core path always are one."""

_RANK = ("none", "mma", "wgmma", "tcgen05")
_FIGURES = {
    "registers": "registers of a thread", "shared": "bytes of shared memory", "cubin": "bytes of code",
}  # fmt: skip


def kernel_findings(old: Kernels, new: Kernels) -> tuple[list[Found], list[str]]:
    """Findings, and notes on what was not compared."""
    for kernels, which in ((old, "the first"), (new, "the second")):
        if kernels.skipped:
            return [], [f"Kernels were not compared: {which} lock has no table, since: {kernels.skipped}."]
    found: list[Found] = []
    for label in dict.fromkeys([*old.table, *new.table]):
        before, after = old.table.get(label), new.table.get(label)
        if before is None:
            found += _new_kernel(label, new.table[label])
        elif after is None:
            found.append(("cosmetic", label, f"is no longer launched; it was by {', '.join(before.regions)}"))
        else:
            for target, row in after.targets.items():
                found += [(severity, label, text) for severity, text in _row(target, before.targets.get(target), row)]
    return found, []


def _new_kernel(label: str, kernel: LockedKernel) -> Iterator[Found]:
    yield "cosmetic", label, f"is new, launched by {', '.join(kernel.regions)}"
    for target, row in kernel.targets.items():
        if row["spilled"]:
            yield "cost", label, f"spills {row['spilled']} bytes of a thread's registers on {target}"


def _row(
    target: str, before: Mapping[str, Any] | None, after: Mapping[str, Any]
) -> Iterator[tuple[Literal["cost", "cosmetic"], str]]:
    if before is None or before == after:
        return
    if after["spilled"] != before["spilled"]:
        worse = after["spilled"] > before["spilled"]
        change = f"{before['spilled']} → {after['spilled']}"
        yield "cost" if worse else "cosmetic", f"spills {change} bytes of a thread's registers on {target}"
    if after["tensor_core"] != before["tensor_core"]:
        lost = _RANK.index(after["tensor_core"]) < _RANK.index(before["tensor_core"])
        change = f"{before['tensor_core']} → {after['tensor_core']}"
        yield (
            "cost" if lost else "cosmetic",
            f"{'loses its' if lost else 'has a new'} tensor-core path on {target}: {change}",
        )
    if after["tile"] != before["tile"]:
        yield "cosmetic", f"takes another tile on {target}: {before['tile']} → {after['tile']}"
    for figure, words in _FIGURES.items():
        if after[figure] != before[figure]:
            worse = after[figure] > before[figure] * (1 + THRESHOLD)
            change = f"{before[figure]:,} → {after[figure]:,}"
            yield "cost" if worse else "cosmetic", f"takes {change} {words} on {target}"

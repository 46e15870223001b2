"""Regressions in a kernel table: spills, lost tensor cores, and figures beyond a threshold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from vlmbuild.locks.document import TENSOR_CORES, Kernels, LockedKernel

Found = tuple[Literal["cost", "cosmetic"], str, str]

THRESHOLD = 0.10
"""Share by which registers, shared memory and code may grow before it is a regression; smaller changes are cosmetic. A new
or larger spill and a lost tensor-core path always are one."""

_FIGURES = {
    "registers": "registers of a thread",
    "shared": "bytes of shared memory",
    "cubin": "bytes of code",
}


def kernel_findings(old: Kernels, new: Kernels) -> tuple[list[Found], list[str]]:
    """Compare two kernel tables; return findings, and notes on kernels that were not compared."""
    if old == new:
        return [], []
    for kernels, which in ((old, "the old"), (new, "the new")):
        if kernels.skipped:
            return [], [f"Kernels were not compared: {which} lock has no table, since: {kernels.skipped}."]
    renamed = _renamed(old, new)
    found: list[Found] = []
    for label in dict.fromkeys([*old.table, *new.table]):
        before, after = old.table.get(renamed.get(label, label)), new.table.get(label)
        if label in renamed:
            found.append(("cosmetic", label, f"takes the place of {renamed[label]}"))
        if before is None:
            found += _new_kernel(label, new.table[label])
        elif after is None:
            if label not in renamed.values():
                found.append(("cosmetic", label, f"is no longer launched; it was by {', '.join(before.regions)}"))
        else:
            found += [(severity, label, text) for severity, text in _rows(before, after)]
    return found, []


def _renamed(old: Kernels, new: Kernels) -> dict[str, str]:
    """Map new labels to old ones, of kernels that the same regions launch with other constants.

    So their figures are compared: a kernel with other tiles may not lose its tensor cores unseen.
    """
    gone, come = _unmatched(old, new), _unmatched(new, old)
    return {now: was for key in come.keys() & gone.keys() for now, was in zip(come[key], gone[key], strict=False)}


def _unmatched(kernels: Kernels, others: Kernels) -> dict[tuple[str, tuple[str, ...]], list[str]]:
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for label, kernel in kernels.table.items():
        if label not in others.table:
            found.setdefault((label.partition(" ")[0], kernel.regions), []).append(label)
    return found


def _rows(before: LockedKernel, after: LockedKernel) -> Iterator[tuple[Literal["cost", "cosmetic"], str]]:
    for target in dict.fromkeys([*before.targets, *after.targets]):
        if target not in after.targets or target not in before.targets:
            yield "cost", f"{target} is in one of the tables alone"
        else:
            yield from _row(target, before.targets[target], after.targets[target])


def _new_kernel(label: str, kernel: LockedKernel) -> Iterator[Found]:
    yield "cosmetic", label, f"is new, launched by {', '.join(kernel.regions)}"
    for target, row in kernel.targets.items():
        if row["spilled"]:
            yield "cost", label, f"spills {row['spilled']} bytes of a thread's registers on {target}"


def _row(
    target: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[tuple[Literal["cost", "cosmetic"], str]]:
    if after["spilled"] != before["spilled"]:
        worse = after["spilled"] > before["spilled"]
        change = f"{before['spilled']} → {after['spilled']}"
        yield "cost" if worse else "cosmetic", f"spills {change} bytes of a thread's registers on {target}"
    if after["tensor_core"] != before["tensor_core"]:
        lost = TENSOR_CORES.index(after["tensor_core"]) < TENSOR_CORES.index(before["tensor_core"])
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

"""Differences between two locks in words: findings by severity, for a reviewer who did not make the change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vlmbuild.ir.dims import growth
from vlmbuild.locks.document import Lock, LockedPass, LockedRegion
from vlmbuild.locks.kernel_difference import kernel_findings
from vlmbuild.locks.listing_difference import ListingDifference, compare_listings

Severity = Literal["interface", "numerics", "fusion", "cost", "cosmetic"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
TITLES: dict[Severity, str] = {
    "interface": "Interface: callers and the host prologue see it",
    "numerics": "Values may change",
    "fusion": "A fusion was lost",
    "cost": "Costs more",
    "cosmetic": "Cosmetic, or better",
}
_LISTING_TOOLS, _KERNEL_TOOLS = ("torch", "transformers"), ("torch", "transformers", "triton")
_MOST_CHANGES = 3
_NUMERIC_OPTIONS = ("dtype", "quantize")


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference.

    Attributes:
        severity: Consequence of the change.
        place: "interface", or the name of a region, a pass or a kernel.
        text: The change in one sentence.
        listing: Unified diff of the region's listing, or nothing.
    """

    severity: Severity
    place: str
    text: str
    listing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """All findings, most severe first.

    Attributes:
        findings: Differences.
        notes: Parts that were not compared, with reasons.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    def of(self, severity: Severity) -> list[Finding]:
        """Return the findings of a severity."""
        return [finding for finding in self.findings if finding.severity == severity]

    @property
    def worst(self) -> Severity | None:
        """The highest severity, or None."""
        return self.findings[0].severity if self.findings else None

    def fails(self, limit: Severity) -> bool:
        """Return whether a finding is at least as severe as `limit`."""
        return self.worst is not None and SEVERITIES.index(self.worst) <= SEVERITIES.index(limit)


def compare(old: Lock, new: Lock) -> Difference:
    """Compare two locks.

    Other versions of torch or transformers change listings and costs, so these are compared only if the versions are equal;
    kernels need equal versions of triton too. A note names skipped parts.
    """
    versions, of_kernels = _version_changes(old, new, _LISTING_TOOLS), _version_changes(old, new, _KERNEL_TOOLS)
    findings = [*_interface(old, new), *_model(old, new), *_recipe(old, new), *_passes(old, new)]
    lost = {finding.place for finding in findings if finding.severity == "fusion"}
    findings += _regions(old, new, lost, listings=not versions)
    notes = [_version_note(versions or of_kernels, listings=not versions)] if of_kernels else []
    if not of_kernels:
        kernels, skipped = kernel_findings(old.kernels, new.kernels)
        findings += [Finding(severity, place, text) for severity, place, text in kernels]
        notes += skipped
    order = {severity: rank for rank, severity in enumerate(SEVERITIES)}
    return Difference(tuple(sorted(findings, key=lambda finding: order[finding.severity])), tuple(notes))


def _version_changes(old: Lock, new: Lock, tools: tuple[str, ...]) -> list[str]:
    return [
        f"{tool} {old.versions.get(tool, 'none')} → {new.versions.get(tool, 'none')}"
        for tool in tools
        if old.versions.get(tool) != new.versions.get(tool)
    ]


def _version_note(versions: list[str], *, listings: bool) -> str:
    if listings:
        return f"Versions differ ({', '.join(versions)}): kernels were not compared."
    return (
        f"Versions differ ({', '.join(versions)}): the interface, matches, weights and operator counts were compared; "
        "listings, costs and kernels were not."
    )


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, old value, new value) of every difference; None stands for a missing value."""
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def _worded(name: str, before: Any, after: Any) -> str:
    if before is None:
        return f"{name} is new: {after}"
    return f"{name} is gone; it was {before}" if after is None else f"{name}: {before} → {after}"


def _interface(old: Lock, new: Lock) -> Iterator[Finding]:
    if old.family != new.family:
        yield Finding("interface", "model", f"the family: {old.family} → {new.family}")
    for name, before, after in _changes(old.interface, new.interface):
        if before is None or after is None:
            yield Finding("interface", "interface", f"variant {name} is {'new' if before is None else 'gone'}")
            continue
        for entry, was, now in _changes(before, after):
            what = f"what variant {name} returns" if entry == "returns" else f"input {entry} of variant {name}"
            yield Finding("interface", "interface", _worded(what, was, now))
    for name, was, now in _changes(old.dimensions, new.dimensions):
        yield Finding("interface", "interface", _worded(f"the range of {name}", was, now))
    for name, was, now in _changes(old.prologue, new.prologue):
        yield Finding("interface", "host prologue", _worded(name, was, now))


def _model(old: Lock, new: Lock) -> Iterator[Finding]:
    for name, was, now in _changes(_flat(old.config), _flat(new.config)):
        yield Finding("cosmetic", "config.json", _worded(name, was, now))
    for name, was, now in _changes(old.variants, new.variants):
        if name in old.interface and name in new.interface:
            calls = compare_listings(was or "", now or "")
            yield Finding("cosmetic", f"variant {name}", "the calls of regions changed", calls.lines)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _recipe(old: Lock, new: Lock) -> Iterator[Finding]:
    before, after = _flat(old.recipe.to_mapping()), _flat(new.recipe.to_mapping())
    for name, was, now in _changes(before, after):
        severity: Severity = "numerics" if name.partition(".")[0] in _NUMERIC_OPTIONS else "cosmetic"
        yield Finding(severity, "recipe", _worded(name, was, now))


def _passes(old: Lock, new: Lock) -> Iterator[Finding]:
    for name in dict.fromkeys([*old.passes, *new.passes]):
        before, after = old.passes.get(name), new.passes.get(name)
        if before is None or after is None:
            state = "is new" if before is None else "did not run"
            known: Any = before or after
            lost: Severity = "fusion" if known.fuses else "cosmetic"
            severity: Severity = "numerics" if not known.exact else "cosmetic" if before is None else lost
            yield Finding(severity, name, f"pass {name} {state}")
            continue
        if before.exact and not after.exact:
            yield Finding("numerics", name, f"pass {name} no longer keeps values")
        yield from _matches(name, before, after, old, new)
        yield from _refusals(name, before, after)


def _matches(name: str, before: LockedPass, after: LockedPass, old: Lock, new: Lock) -> Iterator[Finding]:
    """Yield changed matches, by region if both locks record regions."""
    if before.sites is None or after.sites is None:
        if before.matches != after.matches:
            yield Finding(_severity(before, before.matches, after.matches), name, _count_text(name, before, after))
        return
    for region, was, now in _changes(before.sites, after.sites):
        instances = [lock.regions[region].instances if region in lock.regions else 1 for lock in (old, new)]
        counts = (was or 0) * instances[0], (now or 0) * instances[1]
        reasons = [after.misses[region]] if region in after.misses else []
        reasons += [reason.partition(": ")[2] for reason in after.refusals if reason.startswith(f"{region}: ")]
        why = f": pattern refused, {'; '.join(reasons)}" if reasons and counts[1] < counts[0] else ""
        text = f"{name} matches {counts[0]} → {counts[1]} in {region}{why}"
        yield Finding(_severity(before, *counts), region, text)


def _severity(step: LockedPass, before: int, after: int) -> Severity:
    if not step.exact:
        return "numerics"
    return "fusion" if step.fuses and after < before else "cosmetic"


def _count_text(name: str, before: LockedPass, after: LockedPass) -> str:
    return f"{name} matches {before.matches} → {after.matches}"


def _refusals(name: str, before: LockedPass, after: LockedPass) -> Iterator[Finding]:
    for reason in after.refusals:
        if reason not in before.refusals:
            yield Finding("cosmetic", name, f"{name} newly refuses a site: {reason}")


def _regions(old: Lock, new: Lock, lost: set[str], *, listings: bool) -> Iterator[Finding]:
    for name in dict.fromkeys([*old.regions, *new.regions]):
        before, after = old.regions.get(name), new.regions.get(name)
        if before is None or after is None:
            found = before or after
            assert found is not None
            state = "is new" if before is None else "is gone"
            yield Finding("numerics", name, f"region {name} x {found.instances} {state}")
            continue
        if before.instances != after.instances:
            yield Finding("numerics", name, f"{name} occurs {before.instances} → {after.instances} times")
        for weight, was, now in _changes(before.weights, after.weights):
            stored = [kind or "the compute dtype" for kind in (was, now)]
            yield Finding("numerics", name, f"{weight} is stored as {stored[0]} → {stored[1]}")
        yield from _graph(name, before, after, name in lost, listings=listings)


def _graph(name: str, before: LockedRegion, after: LockedRegion, lost: bool, *, listings: bool) -> Iterator[Finding]:
    if not listings:
        if before.operators != after.operators:
            yield Finding("numerics", name, f"other operators: {_operator_text(before, after)}")
        return
    if before.graph != after.graph:
        listing = compare_listings(before.graph, after.graph)
        severity: Severity = "fusion" if lost else "numerics"
        yield Finding(severity, name, _graph_text(listing, before, after), listing.lines)
    for what in ("flops", "bytes"):
        was, now = getattr(before, what), getattr(after, what)
        if was != now:
            share = growth(was, now)
            worse: Severity = "cost" if share is None or share > 0 else "cosmetic"
            percent = "" if share is None else f" ({100 * share:+.1f} %)"
            label = "FLOPs" if what == "flops" else "bytes moved"
            yield Finding(worse, name, f"{label}: {was} → {now}{percent}")


def _graph_text(listing: ListingDifference, before: LockedRegion, after: LockedRegion) -> str:
    if listing.widened:
        return f"dtypes: {_some(listing.widened)}"
    if before.operators != after.operators:
        return f"other operators: {_operator_text(before, after)}"
    return f"the graph: {_some(listing.changed) or 'the order of values changed'}"


def _some(texts: tuple[str, ...]) -> str:
    """Join the first three; the listing has all."""
    more = len(texts) - _MOST_CHANGES
    return "; ".join([*texts[:_MOST_CHANGES], *([f"and {more} more"] if more > 0 else [])])


def _operator_text(before: LockedRegion, after: LockedRegion) -> str:
    changes = _changes(before.operators, after.operators)
    return ", ".join(f"{name} {was or 0} → {now or 0}" for name, was, now in changes)

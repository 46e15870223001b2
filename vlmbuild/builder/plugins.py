"""Plugins: families, passes and targets of other distributions, by entry points. None is imported until a user names it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlmbuild.errors import UsageError
from vlmbuild.families import FAMILIES, Family
from vlmbuild.passes import EXTRA_PASSES, passes_for
from vlmbuild.recipe import BUILD_TOOLS, TARGET_OPTIONS, Recipe, TargetOptions
from vlmbuild.rewrite.pass_manager import Pass
from vlmbuild.runtime.load import OPENERS, Opener
from vlmbuild.targets import TARGETS, Target
from vlmbuild.util.child import INHERITED_PLUGINS
from vlmbuild.util.text import listed

GROUPS = ("vlmbuild.families", "vlmbuild.passes", "vlmbuild.targets")
"""Entry points: a `Family`, an exact `Pass`, and a `TargetPlugin`; the entry point's name is its key in our tables."""


@dataclass(frozen=True, slots=True)
class TargetPlugin:
    """The rows of a target: what its recipes may ask, how it is written, and how it is loaded."""

    options: TargetOptions
    target: Target
    opener: Opener


def use_plugins(*names: str) -> None:
    """Import installed plugins by their entry points' names, and add what they have to this process.

    Builds record the version of a plugin's distribution beside those of torch and transformers. Load artifacts of such a
    family or target after the same call.

    Raises:
        UsageError: A plugin is not installed, is installed twice, cannot be imported, is no valid entry, or would replace
            something.
    """
    for name in names:
        if name not in INHERITED_PLUGINS:
            entry = _entry(name)
            _add(entry, _loaded(entry))
            INHERITED_PLUGINS.append(name)


def _entry(name: str) -> importlib.metadata.EntryPoint:
    installed = list(_installed())
    found = [entry for entry in installed if entry.name == name]
    if not found:
        known = listed(sorted(entry.name for entry in installed)) if installed else "none"
        raise UsageError(f"Plugin {name!r} is not installed; installed are: {known}. Install its distribution.")
    if len(found) > 1:
        sources = " and ".join(f"{entry.value} ({entry.group})" for entry in found)
        raise UsageError(f"Plugin {name!r} is installed more than once: {sources}. Uninstall all but one.")
    return found[0]


def _installed() -> Iterator[importlib.metadata.EntryPoint]:
    for group in GROUPS:
        yield from importlib.metadata.entry_points(group=group)


def _loaded(entry: importlib.metadata.EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:  # somebody else's module
        raise UsageError(
            f"Plugin {entry.name!r} ({entry.value}) cannot be imported: {type(error).__name__}: {error}. Install a version "
            "of it that fits this vlmbuild."
        ) from error


def _add(entry: importlib.metadata.EntryPoint, plugin: Any) -> None:
    """Add a plugin to our tables, and its distribution to the versions that are recorded."""
    name, kind = entry.name, entry.group
    if kind == "vlmbuild.families":
        _require(entry, isinstance(plugin, Family) and plugin.name == name, f"a Family of that name, not {plugin!r}")
        _require(entry, name not in FAMILIES, "named otherwise: there is a family of that name already")
        owned = {architecture for family in FAMILIES.values() for architecture in family.architectures}
        taken = owned.intersection(plugin.architectures)
        _require(entry, not taken, f"for other architectures; {listed(sorted(taken))} has a family already")
        FAMILIES[name] = plugin
    elif kind == "vlmbuild.passes":
        _require(entry, isinstance(plugin, Pass) and plugin.name == name, f"a pass of that name, not {plugin!r}")
        _require(entry, plugin.exact, "exact: builds do not measure what a foreign pass changes")
        known = {step.name for step in passes_for(Recipe())}
        _require(entry, name not in known, "named otherwise: there is a pass of that name already")
        EXTRA_PASSES[name] = plugin
    else:
        _require(entry, isinstance(plugin, TargetPlugin), f"a TargetPlugin, not {plugin!r}")
        _require(entry, name not in TARGETS, "named otherwise: there is a target of that name already")
        TARGET_OPTIONS[name], TARGETS[name], OPENERS[name] = plugin.options, plugin.target, plugin.opener
    if entry.dist is not None and entry.dist.name not in BUILD_TOOLS:
        BUILD_TOOLS.append(entry.dist.name)


def _require(entry: importlib.metadata.EntryPoint, holds: bool, requirement: str) -> None:
    if not holds:
        raise UsageError(
            f"Plugin {entry.name!r} ({entry.value}) of the group {entry.group} must be {requirement}. Correct the plugin."
        )

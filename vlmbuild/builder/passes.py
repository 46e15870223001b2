"""Questions about a recipe's passes, and the passes that prepare a loaded program for training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vlmbuild.adapters.lora import Lora
from vlmbuild.ir.program import Program
from vlmbuild.passes import adapter_passes, passes_for
from vlmbuild.recipe import Recipe
from vlmbuild.rewrite.near_miss import near_miss
from vlmbuild.rewrite.pass_manager import Pass, PassReport, PatternPass, run


def exact_passes(recipe: Recipe) -> tuple[Pass, ...]:
    """Return the recipe's passes that promise to keep values, in order."""
    return tuple(step for step in passes_for(recipe) if step.exact)


def fusing_passes(recipe: Recipe) -> frozenset[str]:
    """Return the names of the recipe's passes that replace patterns, and can miss some."""
    return frozenset(step.name for step in passes_for(recipe) if isinstance(step, PatternPass))


def missed_patterns(program: Program, recipe: Recipe, reports: Iterable[PassReport]) -> dict[str, dict[str, str]]:
    """Map pass -> region -> the nearest miss, where it rewrote nothing."""
    sites = {report.name: report.sites for report in reports}
    missed: dict[str, dict[str, str]] = {}
    for step in passes_for(recipe):
        if isinstance(step, PatternPass):
            patterns = step.rewrites(program.geometry)
            found = {
                name: near_miss(region.graph.graph, patterns)
                for name, region in program.regions.items()
                if name not in sites.get(step.name, {})
            }
            missed[step.name] = {name: reason for name, reason in found.items() if reason}
    return missed


def adapt(
    program: Program, adapters: Mapping[str, Lora], trained: frozenset[str] = frozenset()
) -> tuple[PassReport, ...]:
    """Add LoRA slots to a loaded program's linear layers, and keep the parameters `trained` in float32, in place.

    Raises:
        PassError: A graph has another form than the passes know.
    """
    return run(adapter_passes(adapters, trained), program)

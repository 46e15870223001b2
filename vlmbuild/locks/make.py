"""Make locks from a config and a recipe, or from an artifact. No weights are read."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.builder.passes import exact_passes, fusing_passes, missed_patterns
from vlmbuild.builder.tracing import Traced, apply_recipe, artifact_config_values, portable
from vlmbuild.errors import UsageError
from vlmbuild.families import Family, family_of
from vlmbuild.ir.cost import region_cost
from vlmbuild.ir.dims import size_text
from vlmbuild.ir.printer import region_text, short_dtype, variant_text
from vlmbuild.ir.program import Program, Region, Variant, returned_nodes
from vlmbuild.ir.shapes import annotate_shapes
from vlmbuild.locks.canonical_order import canonical
from vlmbuild.locks.document import NO_KERNELS, Lock, LockedPass, LockedRegion
from vlmbuild.locks.kernel_table import kernel_table
from vlmbuild.recipe import Recipe
from vlmbuild.runtime.bind import read_program
from vlmbuild.util.renamed import PASSES

LOCK_TOOLS = ("vlmbuild", "torch", "transformers", "triton")
"""Distributions whose versions a lock records."""


def lock_traced(traced: Traced, recipe: Recipe, *, kernels: bool = True) -> Lock:
    """Lock a traced model under a recipe.

    Args:
        traced: Model; it is not changed.
        recipe: Recipe without a bit budget, which would need weights.
        kernels: False leaves the kernel table out.

    Raises:
        UsageError: The recipe has a budget, or a pattern that matches nothing.
        PassError: A pass failed, or a required one matched nothing.
    """
    if recipe.quantize is not None and recipe.quantize.format == "auto":
        raise UsageError(
            "auto measures weights, but a lock is made without weights. Pass --quantize nf4, or overrides."
        )
    program, reports = apply_recipe(traced, recipe)
    fusing = fusing_passes(recipe)
    misses = missed_patterns(program, recipe, reports)
    passes = {
        report.name: LockedPass(
            report.exact,
            report.name in fusing,
            report.matches,
            report.refusals,
            dict(sorted(report.sites.items())),
            misses.get(report.name, {}),
        )
        for report in reports
    }
    return lock_program(program, traced.family, traced.values, recipe, passes, traced.uri, kernels=kernels)


def lock_artifact(path: Path, *, kernels: bool = True) -> Lock:
    """Lock an artifact: the program that it contains, not the one that this version would build.

    Raises:
        IntegrityError, IncompatibleError: The artifact cannot be read.
    """
    reader = ArtifactReader(path, verify=False)
    manifest = reader.manifest
    values = artifact_config_values(reader)
    program = read_program(reader)
    annotate_shapes(program)
    recipe = Recipe.from_mapping(manifest.recipe, str(path))
    fusing, exact = fusing_passes(recipe), {step.name for step in exact_passes(recipe)}
    passes = {
        name: LockedPass(name in exact, name in fusing, record["matches"], tuple(record["refusals"]), None)
        for record in manifest.passes
        for name in [PASSES.get(record["name"], record["name"])]
    }
    lock = lock_program(
        program, family_of(values, str(path)), portable(values), recipe, passes, "artifact", kernels=kernels
    )
    versions = {tool: str(version) for tool, version in manifest.toolchain.items() if tool in LOCK_TOOLS}
    return replace(lock, versions=lock.versions | versions)


def lock_program(
    program: Program,
    family: Family,
    values: dict[str, Any],
    recipe: Recipe,
    passes: dict[str, LockedPass],
    uri: str,
    *,
    kernels: bool = True,
) -> Lock:
    """Lock a finished program with shapes."""
    dtype = getattr(torch, recipe.dtype)
    ordered = canonical(program)
    return Lock(
        source=uri,
        family=family.name,
        recipe=recipe,
        versions=tool_versions(),
        interface={name: _interface(variant, program) for name, variant in ordered.variants.items()},
        dimensions=_dimensions(ordered),
        prologue=_prologue(family, values),
        variants={name: _calls_text(variant) for name, variant in ordered.variants.items()},
        regions={name: _locked_region(region, dtype.itemsize) for name, region in ordered.regions.items()},
        passes=passes,
        kernels=kernel_table(program, dtype) if kernels else NO_KERNELS,
        config=values,
    )


def tool_versions() -> dict[str, str]:
    """Return the version of each tool that a lock depends on, or "none"."""
    versions = {}
    for tool in LOCK_TOOLS:
        try:
            versions[tool] = importlib.metadata.version(tool).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            versions[tool] = "none"
    return versions


def _interface(variant: Variant, program: Program) -> dict[str, str]:
    inputs = {entry.name: f"{short_dtype(entry.dtype)}[{', '.join(map(str, entry.shape))}]" for entry in variant.inputs}
    last = program.regions[variant.calls[-1].region]
    return {**inputs, "returns": _type_of(last)}


def _type_of(region: Region) -> str:
    value = returned_nodes(region.graph)[0].meta["val"]
    return f"{short_dtype(value.dtype)}[{', '.join(size_text(size, region.dimensions) for size in value.shape)}]"


def _calls_text(variant: Variant) -> str:
    """Render the calls of a variant; its inputs are part of the interface."""
    return "\n".join(variant_text(variant).splitlines()[len(variant.inputs) :]) + "\n"


def _dimensions(program: Program) -> dict[str, str]:
    """Return the range of sizes of each dynamic dimension."""
    ranges: dict[str, str] = {}
    for region in program.regions.values():
        for node in region.placeholders():
            value = node.meta.get("val")
            for size in value.shape if isinstance(value, torch.Tensor) else ():
                if isinstance(size, torch.SymInt):
                    ranges |= _symbol_ranges(size, region.dimensions)
    return dict(sorted(ranges.items()))


def _symbol_ranges(size: torch.SymInt, names: Mapping[str, str]) -> dict[str, str]:
    known = size.node.shape_env.var_to_range
    ranges = {}
    for symbol in size.node.expr.free_symbols:
        bounds = known[symbol]
        upper = "unbounded" if not bounds.upper.is_finite or bounds.upper > 2**40 else str(bounds.upper)
        ranges[names[str(symbol)]] = f"{bounds.lower} to {upper}"
    return ranges


def _prologue(family: Family, values: Mapping[str, Any]) -> dict[str, str]:
    """Describe the inputs of the host prologue besides input_ids and attention_mask, and the constants of the config."""
    rows = {name: f"one row a {row}" for name, row in sorted(family.input_layout.items())}
    constants = family.constants(family.config(values))
    return rows | {
        name: f"constant {short_dtype(tensor.dtype)}{list(tensor.shape)}" for name, tensor in sorted(constants.items())
    }


def _locked_region(region: Region, itemsize: int) -> LockedRegion:
    cost = region_cost(region, itemsize)
    weights = {recipe.source: recipe.format.describe() for recipe in region.recipes}
    return LockedRegion(
        instances=len(region.instances),
        flops=cost.flops,
        bytes=cost.bytes,
        operators=cost.operators,
        weights=dict(sorted(weights.items())),
        graph=region_text(region) + "\n",
    )

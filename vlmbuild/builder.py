"""From a source and a recipe to an artifact; the only importer of passes and targets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmbuild.artifact.checkpoint import CheckpointWeights
from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.output import check_output
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.capture import capture
from vlmbuild.errors import PassError, SourceError
from vlmbuild.families import Family, family_of
from vlmbuild.outline import outline
from vlmbuild.passes import AddLora, passes_for
from vlmbuild.pipeline import PassReport, run
from vlmbuild.program import Program, Role
from vlmbuild.recipe import Recipe
from vlmbuild.source import Progress, Source, resolve
from vlmbuild.targets import STORED, WRITERS, Job, Request

_IGNORED_SOURCE_TENSORS = re.compile(r".*rotary_emb\.inv_freq|.*rotary_pos_emb\.inv_freq")
"""Buffers that old checkpoints store; they follow from the config."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished build.

    Attributes:
        path: The artifact's directory.
        manifest: What it holds; `manifest.id` is its identity.
        reports: What each pass did.
    """

    path: Path
    manifest: Manifest
    reports: tuple[PassReport, ...]


def build(
    source: str | Path,
    output: str | Path,
    recipe: Recipe = Recipe(),
    *,
    overwrite: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Build an artifact.

    Args:
        source: A checkpoint directory, a hub id, or the name of a zoo checkpoint.
        output: The directory to make; appears complete or not at all.
        recipe: What to build.
        overwrite: Replace an artifact that is there.
        revision: Of a hub id.
        progress: Called with a stage's name, the amount done, and the total.

    Raises:
        OutputError: The output exists or cannot be written; found before any work.
        SourceError: The source cannot be used.
        CaptureError, PassError: The graph cannot be built as asked.
    """
    told = progress or (lambda _stage, _done, _total: None)
    check_recipe(recipe)
    check_output(Path(output), overwrite=overwrite)
    found = resolve(source, revision=revision, progress=told)
    values, family, config = read_model(found)
    weights = CheckpointWeights(found.directory)
    program = trace_program(family, config, told)
    check_weights(program, family, weights)
    reports = rewrite(program, recipe, told)
    request = Request(program, reports, family, values, recipe, found, weights, told)
    with ArtifactWriter(output, overwrite=overwrite) as writer:
        manifest = WRITERS[recipe.target](writer, request)
    return Artifact(Path(output), manifest, reports)


def check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe that requires passes which it does not have, before any work.

    Raises:
        PassError: The passes are listed.
    """
    known = [step.name for step in passes_for(recipe)]
    if unknown := sorted(set(recipe.require) - set(known)):
        raise PassError(f"Required pass {unknown[0]!r} is not part of this build. Its passes: {', '.join(known)}.")


def read_model(source: Source) -> tuple[dict[str, Any], Family, Any]:
    """A source's config.json, the family that reads it, and the family's config.

    Raises:
        SourceError: No family does, the values are invalid, or the weights are quantized already.
    """
    values = source.config()
    family = family_of(values, str(source.directory / "config.json"))
    if "quantization_config" in values:
        method = values["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise SourceError(
            f"{source.directory} is quantized already ({method}). Build from the unquantized checkpoint; quantized "
            "sources are not supported yet."
        )
    return values, family, family.config(values)


def trace_program(family: Family, config: Any, progress: Progress) -> Program:
    """Capture and outline all variants of a model, from its config alone."""
    traces = {}
    for name in family.variants(config):
        progress(f"capture {name}", 0, 1)
        traces[name] = capture(family, config, name)
        progress(f"capture {name}", 1, 1)
    return outline(family, family.geometry(config), family.ties(config), traces)


def rewrite(program: Program, recipe: Recipe, progress: Progress) -> tuple[PassReport, ...]:
    """Run the recipe's passes over a program, in place."""
    passes = passes_for(recipe)
    progress("passes", 0, len(passes))
    done = iter(range(1, len(passes) + 1))
    return run(passes, program, require=recipe.require, on_pass=lambda _: progress("passes", next(done), len(passes)))


def check_weights(program: Program, family: Family, weights: CheckpointWeights) -> None:
    """Hold a checkpoint's tensors against the program, before any is read.

    Raises:
        SourceError: Tensors are missing, left over, or of another shape than the config says; they are named.
    """
    stored = {family.module_name(name): info for name, info in weights.tensors.items()}
    needed = {name: slot for name, slot in program.slots() if slot.kind == "parameter"}
    missing = sorted(set(needed) - set(stored))
    if missing:
        raise SourceError(
            f"{weights.directory} lacks {_listed(missing, family)}, which config.json asks for. The checkpoint is "
            "incomplete, or its config.json belongs to another model."
        )
    for name, slot in needed.items():
        if stored[name].shape != slot.shape:
            raise SourceError(
                f"{weights.directory}: tensor {family.stored_name(name)} has shape {list(stored[name].shape)}, but "
                f"config.json asks for {list(slot.shape)}. The weights and config.json do not belong together."
            )
    extra = sorted(
        name for name in set(stored) - set(needed) - set(program.ties) if not _IGNORED_SOURCE_TENSORS.fullmatch(name)
    )
    if extra:
        raise SourceError(
            f"{weights.directory} holds {_listed(extra, family)}, which a model with this config.json does not have. "
            "Building would lose them; check num_hidden_layers and depth."
        )


def planned_weights(program: Program, family: Family, recipe: Recipe) -> Iterator[Job]:
    """What a finished program's artifact will store, before any weight is read."""
    return STORED[recipe.target](program, family, recipe)


def adapt(
    program: Program, r: int, alpha: float, roles: tuple[Role, ...], modules: frozenset[str] | None = None
) -> PassReport:
    """Add LoRA slots to a program's linear layers of these roles (and of these names, if given), in place."""
    return run([AddLora(r, alpha, roles, modules)], program)[0]


def _listed(names: list[str], family: Family) -> str:
    shown = ", ".join(family.stored_name(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more tensors" if len(names) > 5 else "")

"""From a source and a recipe to an artifact; the only importer of passes and targets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmbuild.artifact.bitsandbytes_config import check_method
from vlmbuild.artifact.checkpoint import CheckpointWeights
from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.output import check_output
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.calibration import Batch, batches_digest, output_losses
from vlmbuild.capture import capture
from vlmbuild.devices import available_device
from vlmbuild.digests import Digests
from vlmbuild.errors import PassError, SourceError, UsageError
from vlmbuild.families import Family, family_of
from vlmbuild.lora import Lora
from vlmbuild.outline import outline
from vlmbuild.passes import adapter_passes, passes_for, quantization_passes
from vlmbuild.pipeline import PassReport, run
from vlmbuild.program import Program
from vlmbuild.quant_spec import QuantSpec
from vlmbuild.quantization import QUANTIZE, Decision, LinearLayer, decide, linear_layers
from vlmbuild.recipe import Recipe
from vlmbuild.sensitivity import check_plain, refine, weight_losses
from vlmbuild.source import Progress, Source, resolve
from vlmbuild.source_tensors import SourceTensor, source_tensors, stored_formats
from vlmbuild.targets import STORED, WRITERS, Request, StoredParameter
from vlmbuild.weight_format import FourBit

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
    device: str = "cpu",
    calibration: Sequence[Batch] = (),
    progress: Progress | None = None,
) -> Artifact:
    """Build an artifact.

    Args:
        source: A checkpoint directory, a hub id, or the name of a zoo checkpoint.
        output: The directory to make; appears complete or not at all.
        recipe: What to build.
        overwrite: Replace an artifact that is there.
        revision: Of a hub id.
        device: Where weights are quantized, "cpu" or "cuda".
        calibration: Batches of the processor on which layers are measured when the recipe has a budget; without them
            weights alone are.
        progress: Called with a stage's name, the amount done, and the total; from several threads, one at a time.

    Raises:
        UsageError: A pattern matches nothing, the budget cannot be met, or there is calibration without one.
        DeviceError: The device is not available here.
        OutputError: The output exists or cannot be written; found before any work.
        SourceError: The source cannot be used.
        CaptureError, PassError: The graph cannot be built as asked.
    """
    told = progress or (lambda _stage, _done, _total: None)
    available_device(device)
    check_calibration(recipe, calibration)
    check_output(Path(output), overwrite=overwrite)
    found = resolve(source, revision=revision, progress=told)
    values, family, config = read_model(found)
    weights = CheckpointWeights(found.directory)
    tensors = source_tensors(weights, family, values)
    with Digests(found, weights.files) as digests:
        program = trace_program(family, config, told)
        check_weights(program, family, weights, tensors)
        reports, decisions = rewrite(
            program,
            recipe,
            lambda: decide_formats(program, family, config, recipe, weights, tensors, calibration, told),
            told,
        )
        request = Request(
            program, reports, family, values, recipe, found, digests.futures, weights, tensors, decisions,
            batches_digest(calibration), device, told,
        )  # fmt: skip
        with ArtifactWriter(output, overwrite=overwrite) as writer:
            manifest = WRITERS[recipe.target](writer, request)
    return Artifact(Path(output), manifest, reports)


def check_calibration(recipe: Recipe, calibration: object) -> None:
    """Refuse calibration for a recipe without a budget. Raises UsageError."""
    if calibration and (recipe.quantize is None or recipe.quantize.budget is None):
        raise UsageError("Calibration is for quantization with a budget. Use auto with a budget, or leave it out.")


def read_model(source: Source) -> tuple[dict[str, Any], Family, Any]:
    """A source's config.json, the family that reads it, and the family's config.

    Raises:
        SourceError: No family does, the values are invalid, or the weights are quantized in a way that is not known.
    """
    values = source.config()
    family = family_of(values, str(source.directory / "config.json"))
    if values.get("quantization_config") is not None:
        check_method(values["quantization_config"], str(source.directory))
    return values, family, family.config(values)


def trace_program(family: Family, config: Any, progress: Progress) -> Program:
    """Capture and outline all variants of a model, from its config alone."""
    traces = {}
    for name in family.variants(config):
        progress(f"capture {name}", 0, 1)
        traces[name] = capture(family, config, name)
        progress(f"capture {name}", 1, 1)
    return outline(family, family.geometry(config), family.ties(config), traces)


def decide_formats(
    program: Program,
    family: Family,
    config: Any,
    recipe: Recipe,
    weights: CheckpointWeights,
    tensors: Mapping[str, SourceTensor],
    calibration: Sequence[Batch],
    progress: Progress,
) -> dict[str, Decision]:
    """How every linear layer's weight is to be stored; for a recipe with a budget, from measurements.

    Raises:
        UsageError: A pattern matches nothing, or the budget cannot be met.
        SourceError: A layer is quantized in another format already, or a weight cannot be measured.
    """
    spec = recipe.quantize
    decisions = decide(program, spec, stored=stored_formats(tensors), published=published_name(family))
    if spec is None or spec.budget is None:
        return decisions
    form = spec.weight_format()
    assert isinstance(form, FourBit)  # auto's
    asked = [layer for layer in linear_layers(program) if _is_open(decisions[layer.module], form, layer, spec)]
    if not asked:
        raise UsageError("No linear layer is left for the budget to decide about. Check roles, skips and overrides.")
    for tensor in tensors.values() if calibration else [tensors[f"{layer.module}.weight"] for layer in asked]:
        check_plain(tensor)
    dtype = getattr(torch, recipe.dtype)
    losses = (
        output_losses(program, family, config, calibration, asked, form, weights, tensors, progress)
        if calibration
        else weight_losses(asked, form, weights, tensors, dtype, progress)
    )
    return refine(decisions, losses, form, spec.budget, 8 * dtype.itemsize)


def _is_open(decision: Decision, form: FourBit, layer: LinearLayer, spec: QuantSpec) -> bool:
    """Whether it was the spec's format that decided, and not a pattern of the user's."""
    return decision.format == form and layer.role in spec.roles and not decision.pinned


def published_name(family: Family) -> Callable[[str], str]:
    """Module name -> that in published checkpoints."""
    return lambda module: family.stored_name(f"{module}.weight").removesuffix(".weight")


def rewrite(
    program: Program, recipe: Recipe, decisions_for: Callable[[], dict[str, Decision]], progress: Progress
) -> tuple[tuple[PassReport, ...], dict[str, Decision]]:
    """Run the recipe's passes over a program, in place.

    Args:
        program: As captured.
        recipe: Says which passes.
        decisions_for: Called when only quantization is left to do, and says how.
        progress: Told how many passes are done.
    """
    passes = passes_for(recipe)
    progress("passes", 0, len(passes))
    done = iter(range(1, len(passes) + 1))
    early = [name for name in recipe.require if name != QUANTIZE]
    reports = run(
        passes, program, require=early, on_pass=lambda _: progress("passes", next(done), len(passes))
    )  # fmt: skip
    decisions = decisions_for()
    quantization = quantization_passes(recipe, decisions)
    if QUANTIZE in recipe.require and not quantization:
        raise PassError(
            f"Required pass {QUANTIZE!r} is not part of this build, which quantizes nothing. Add --quantize nf4, or drop it."
        )
    late = [name for name in recipe.require if name == QUANTIZE]
    return (*reports, *run(quantization, program, require=late, before=reports)), decisions


def check_weights(
    program: Program, family: Family, weights: CheckpointWeights, tensors: Mapping[str, SourceTensor]
) -> None:
    """Hold a checkpoint's tensors against the program, before any is read.

    Raises:
        SourceError: Tensors are missing, left over, or of another shape than the config says; they are named.
    """
    needed = {name: slot for name, slot in program.slots() if slot.kind == "parameter"}
    missing = sorted(set(needed) - set(tensors))
    if missing:
        raise SourceError(
            f"{weights.directory} lacks {_listed(missing, family)}, which config.json asks for. The checkpoint is "
            "incomplete, or its config.json belongs to another model."
        )
    for name, slot in needed.items():
        if tensors[name].shape != slot.shape:
            raise SourceError(
                f"{weights.directory}: tensor {family.stored_name(name)} has shape {list(tensors[name].shape)}, but "
                f"config.json asks for {list(slot.shape)}. The weights and config.json do not belong together."
            )
        if tensors[name].format is None and not tensors[name].dtype.is_floating_point:
            raise SourceError(
                f"{weights.directory}: tensor {family.stored_name(name)} is {tensors[name].dtype}, and config.json does not "
                "say that it is quantized. Get the original checkpoint."
            )
    linear = {f"{layer.module}.weight" for layer in linear_layers(program) if not layer.refusal}
    for name, tensor in tensors.items():
        if tensor.format is not None and name in needed and name not in linear:
            raise SourceError(
                f"{weights.directory}: {tensor.name} is quantized, but it is not the weight of a linear layer."
            )
    extra = sorted(
        name for name in set(tensors) - set(needed) - set(program.ties) if not _IGNORED_SOURCE_TENSORS.fullmatch(name)
    )
    if extra:
        raise SourceError(
            f"{weights.directory} holds {_listed(extra, family)}, which a model with this config.json does not have. "
            "Building would lose them; check num_hidden_layers and depth."
        )


def planned_weights(program: Program, family: Family, recipe: Recipe) -> Iterator[StoredParameter]:
    """What a finished program's artifact will store, before any weight is read."""
    return STORED[recipe.target](program, family, recipe)


def adapt(
    program: Program, adapters: Mapping[str, Lora], trained: frozenset[str] = frozenset()
) -> tuple[PassReport, ...]:
    """Add LoRA slots to a loaded program's linear layers, and keep the parameters `trained` in float32, in place.

    Raises:
        PassError: A graph has another form than the passes know.
    """
    return run(adapter_passes(adapters, trained), program)


def _listed(names: list[str], family: Family) -> str:
    shown = ", ".join(family.stored_name(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more tensors" if len(names) > 5 else "")

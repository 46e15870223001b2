"""From a source and a recipe to an artifact; the only importer of passes and targets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlmbuild.adapters.lora import Lora
from vlmbuild.adapters.merge import Merge, check_mergeable, read_merge
from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.output import check_output
from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.capture.export import capture
from vlmbuild.capture.outline import outline
from vlmbuild.checkpoint.digests import Digests
from vlmbuild.checkpoint.fit import check_weights
from vlmbuild.checkpoint.source import Progress, Source, resolve
from vlmbuild.checkpoint.tensors import SourceTensor, published_name, source_tensors, stored_formats
from vlmbuild.errors import PassError, UsageError
from vlmbuild.families import Family, family_of
from vlmbuild.formats import WeightFormat
from vlmbuild.ir.linear_layers import LinearLayer, linear_layers
from vlmbuild.ir.program import Program
from vlmbuild.measure.calibration import Batch, batches_digest, output_losses
from vlmbuild.measure.merge_parity import ParityCheck, make_probe
from vlmbuild.measure.sensitivity import check_plain, refine, weight_losses
from vlmbuild.passes import adapter_passes, passes_for, quantization_passes
from vlmbuild.quant.bnb_config import check_method
from vlmbuild.quant.decide import QUANTIZE, Decision, decide
from vlmbuild.quant.spec import QuantSpec
from vlmbuild.recipe import Recipe
from vlmbuild.rewrite.near_miss import near_miss
from vlmbuild.rewrite.pass_manager import Pass, PassReport, PatternPass, run
from vlmbuild.targets import TARGETS, Request
from vlmbuild.util.devices import available_device


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
    source: str | Path | Source,
    output: str | Path,
    recipe: Recipe = Recipe(),
    *,
    overwrite: bool = False,
    revision: str | None = None,
    device: str = "cpu",
    calibration: Sequence[Batch] = (),
    adapter: str | Path | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Build an artifact, of a checkpoint alone or with an adapter merged into its weights.

    With an adapter, a recipe without quantization gives an unquantized artifact, whatever the source is: rounding again
    would lose part of what was learned. A format that is asked for rounds the merged layers anew; layers without an adapter
    keep the source's bytes where the format is the same ("source": everywhere). Merged weights are held against source and
    adapter on a batch before anything is published, and the figures are in the manifest's `numerics`.

    Args:
        source: A checkpoint directory, a hub id, or the name of a zoo checkpoint.
        output: The directory to make; appears complete or not at all.
        recipe: What to build.
        overwrite: Replace an artifact that is there.
        revision: Of a hub id.
        device: Where weights are quantized, "cpu" or "cuda".
        calibration: Batches of the processor on which layers are measured when the recipe has a budget; without them
            weights alone are.
        adapter: Directory of a LoRA adapter in PEFT's format.
        progress: Called with a stage's name, the amount done, and the total; from several threads, one at a time.

    Raises:
        UsageError: A pattern matches nothing, the budget cannot be met, there is calibration without one, or an adapter with
            one.
        DeviceError: The device is not available here.
        OutputError: The output exists or cannot be written; found before any work.
        SourceError: The source or the adapter cannot be used.
        CaptureError, PassError: The graph cannot be built as asked.
        ParityError: The merged weights are not what source and adapter are together.
    """
    told = progress or (lambda _stage, _done, _total: None)
    device_type = available_device(device).type
    target = TARGETS[recipe.target]
    if device_type not in target.devices:
        raise UsageError(
            f"--target {recipe.target} is built on {' or '.join(target.devices)}, not on {device}. Leave --device out, or "
            "build the trainable target for a GPU."
        )
    recipe.check_calibration(bool(calibration))
    check_output(Path(output), overwrite=overwrite)
    if adapter is not None:
        check_mergeable(recipe, adapter, output)
    found = resolve(source, revision=revision, progress=told)
    values, family, config = read_model(found)
    weights = CheckpointWeights(found.directory)
    tensors = source_tensors(weights, family, values)
    with target.begin() as write, Digests(found, weights.files) as digests:
        program = trace_program(family, config, told)
        check_weights(program, family, weights, tensors)
        merge = None if adapter is None else read_merge(adapter, program, family)
        probe = None if adapter is None else make_probe(program, family, config, found.directory)
        traced = None if adapter is None else copy.deepcopy(program)
        reports, decisions = rewrite(
            program,
            recipe,
            lambda: decide_formats(program, family, config, recipe, weights, tensors, calibration, merge, told),
            told,
        )
        check = None
        if merge is not None and probe is not None and traced is not None:
            reference, merged = _parity_programs(traced, recipe, decisions, merge)
            check = ParityCheck(
                family, config, reference, merged, weights, tensors, merge.adapter, probe, recipe.dtype, told
            )
        request = Request(
            program,
            reports,
            family,
            values,
            recipe,
            found,
            digests.futures,
            weights,
            tensors,
            decisions,
            batches_digest(calibration),
            device,
            merge,
            check.measure if check else lambda _directory: (),
            told,
        )
        with ArtifactWriter(output, overwrite=overwrite) as writer:
            manifest = write(writer, request)
    return Artifact(Path(output), manifest, reports)


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
    merge: Merge | None,
    progress: Progress,
) -> dict[str, Decision]:
    """How every linear layer's weight is to be stored; for a recipe with a budget, from measurements. A layer with an adapter
    is as good as new: whatever the source has it in, it may be stored in any format.

    Raises:
        UsageError: A pattern matches nothing, or the budget cannot be met.
        SourceError: A layer is quantized in another format already, or a weight cannot be measured.
    """
    spec = recipe.quantize
    stored = stored_formats(tensors)
    if merge is not None:
        spec = spec or QuantSpec("none")
        stored = {module: form for module, form in stored.items() if not merge.changes(f"{module}.weight")}
    decisions = decide(program, spec, stored=stored, published=published_name(family))
    if spec is None or spec.budget is None:
        return decisions
    form = spec.weight_format()
    assert form is not None  # a budget has a format
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


def _parity_programs(
    traced: Program, recipe: Recipe, decisions: Mapping[str, Decision], merge: Merge
) -> tuple[Program, Program]:
    """From a program before its passes: unquantized with slots for the adapter, and as its weights are stored. On the
    kernels that run anywhere."""
    run(passes_for(replace(recipe, attention="sdpa")), traced)
    merged = copy.deepcopy(traced)
    run(quantization_passes(recipe, decisions), merged)
    adapt(traced, merge.adapter.loras)
    return traced, merged


def _is_open(decision: Decision, form: WeightFormat, layer: LinearLayer, spec: QuantSpec) -> bool:
    """Whether it was the spec's format that decided, and not a pattern of the user's."""
    return decision.format == form and layer.role in spec.roles and not decision.pinned


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
    reports = run(passes, program, require=early, on_pass=lambda _: progress("passes", next(done), len(passes)))
    decisions = decisions_for()
    quantization = quantization_passes(recipe, decisions)
    if QUANTIZE in recipe.require and not quantization:
        raise PassError(
            f"Required pass {QUANTIZE!r} is not part of this build, which quantizes nothing. Add --quantize nf4, or drop it."
        )
    late = [name for name in recipe.require if name == QUANTIZE]
    return (*reports, *run(quantization, program, require=late, before=reports)), decisions


def exact_passes(recipe: Recipe) -> tuple[Pass, ...]:
    """The recipe's passes that promise to keep values, in order."""
    return tuple(step for step in passes_for(recipe) if step.exact)


def fusing_passes(recipe: Recipe) -> frozenset[str]:
    """Names of the recipe's passes that replace patterns, and can miss some."""
    return frozenset(step.name for step in passes_for(recipe) if isinstance(step, PatternPass))


def missed_patterns(program: Program, recipe: Recipe, reports: Iterable[PassReport]) -> dict[str, dict[str, str]]:
    """Pass -> region -> how what comes closest to the pass's patterns differs from them, where it rewrote nothing."""
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

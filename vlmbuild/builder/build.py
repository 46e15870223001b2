"""Build an artifact from a source and a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmbuild.adapters.identity import check_base, read_base
from vlmbuild.adapters.merge import Merge, check_mergeable
from vlmbuild.adapters.peft_files import WEIGHTS_FILE
from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.output import check_output, check_space
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.builder.budget import within_budget
from vlmbuild.capture.export import capture
from vlmbuild.capture.outline import outline
from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.checkpoint.fit import check_weights
from vlmbuild.checkpoint.source import Source
from vlmbuild.errors import OutputError, PassError, UsageError
from vlmbuild.families import Family
from vlmbuild.golden.cases import GoldenCase, read_cases
from vlmbuild.ir.program import Program
from vlmbuild.measure.calibration import Batch, batches_digest
from vlmbuild.measure.merge_parity import MergeCheck
from vlmbuild.passes import passes_for, quantization_passes
from vlmbuild.quant.decide import Decision, decide
from vlmbuild.quant.spec import QUANTIZE_PASS, QuantSpec
from vlmbuild.recipe import Recipe, formats_of_targets
from vlmbuild.rewrite.pass_manager import PassReport, check_required, run
from vlmbuild.targets import TARGETS, Request, Target
from vlmbuild.util.devices import available_device
from vlmbuild.util.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished build.

    Attributes:
        path: The artifact's directory.
        manifest: Manifest of the artifact; `manifest.id` is its identity.
        reports: Report of each pass.
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
    allow_other_base: bool = False,
    processor: str | Path | None = None,
    golden: bool | str | Path = False,
    strip_prefix: str = "",
    progress: Progress | None = None,
) -> Artifact:
    """Build an artifact, of a checkpoint alone or with an adapter merged into its weights.

    With an adapter, a recipe without quantization gives an unquantized artifact, whatever the source is: rounding again
    would lose part of the training. A requested format rounds merged layers again; layers without an adapter
    keep the source's bytes where the format is the same ("source": everywhere). Merged weights are compared with source and
    adapter on a batch before anything is published, and the figures are in the manifest's `numerics`.

    Args:
        source: A checkpoint directory, a hub id, or the name of a zoo checkpoint.
        output: The directory to make; appears complete or not at all.
        recipe: Recipe of the build.
        overwrite: Replace an artifact that is there.
        revision: Revision of a hub id.
        device: Where weights are quantized, "cpu" or "cuda".
        calibration: Batches of the processor on which layers are measured when the recipe has a budget; without them
            weights alone are.
        adapter: Directory of a LoRA adapter in PEFT's format.
        allow_other_base: Merge an adapter of `save_adapter` that was trained on other weights or with another processor.
        processor: Source of the processor's files, where the model's has none or others are wanted.
        golden: Record golden cases in the artifact: True for packaged prompts and images, or a JSONL file of conversations.
        strip_prefix: Leading part of every tensor's name in the source, such as "module.", to leave out.
        progress: Called with a stage's name, the amount done, and the total; from several threads, one at a time.

    Raises:
        UsageError: A pattern matches nothing, the budget cannot be met, there is calibration without one, or an adapter with
            one.
        DeviceError: The device is not available here.
        OutputError: The output exists or cannot be written; found before any work.
        SourceError: The source or the adapter cannot be used.
        CaptureError, PassError: The graph cannot be built.
        ParityError: The merged weights differ from source plus adapter.
    """
    progress = progress or silent
    target = _checked_target(recipe, device)
    recipe.check_calibration(bool(calibration))
    check_passes(recipe)
    prompts = _golden_cases(golden, target, recipe)
    check_output(output, overwrite=overwrite)
    if adapter is not None:
        check_mergeable(recipe, adapter, output)
    checkpoint = Checkpoint.open(
        source, revision=revision, processor=processor, strip_prefix=strip_prefix, progress=progress
    )
    recipe, output = recipe.with_source_dtype(checkpoint.artifact_dtype), Path(output)
    _check_outside(output, checkpoint)
    # What is malformed is refused before the capture.
    check_space(output, output.absolute().parent, least_bytes(checkpoint, recipe))
    _ = checkpoint.processor
    with target.begin() as write, checkpoint.hashing() as digests:
        program = trace_program(checkpoint.family, checkpoint.config, progress)
        check_weights(program, checkpoint)
        merged = None if adapter is None else MergeCheck.prepare(adapter, program, checkpoint)
        merge = None if merged is None else merged.merge
        reports, decisions = apply_passes(program, checkpoint, recipe, progress, calibration=calibration, merge=merge)
        request = Request(
            checkpoint=checkpoint,
            digests=digests,
            recipe=recipe,
            program=program,
            reports=reports,
            decisions=decisions,
            calibration=batches_digest(calibration),
            device=device,
            merged=merged,
            golden=prompts,
            progress=progress,
        )
        if adapter is not None and not allow_other_base and (trained := read_base(Path(adapter), WEIGHTS_FILE)):
            check_base(adapter, trained, checkpoint.base(digests))
        with ArtifactWriter(output, overwrite=overwrite) as writer:
            manifest = write(writer, request)
    return Artifact(Path(output), manifest, reports)


def _golden_cases(golden: bool | str | Path, target: Target, recipe: Recipe) -> tuple[GoldenCase, ...] | None:
    """Read the prompts to record; None for none. Raises UsageError for a target that records none."""
    if golden is False:
        return None
    if not target.golden:
        able = " or ".join(f"--target {name}" for name, row in TARGETS.items() if row.golden)
        raise UsageError(f"--target {recipe.target} records no golden cases. Drop --golden, or choose {able}.")
    return () if golden is True else tuple(read_cases(Path(golden)))


def least_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Return what the weights of a build take at least; which layers are quantized is known after the capture."""
    spec, bits = recipe.quantize, 0
    plain = 8 * getattr(torch, recipe.dtype).itemsize
    for name, tensor in checkpoint.tensors.items():
        sizes = [plain * math.prod(tensor.shape)]
        if tensor.format is not None:
            sizes.append(8 * tensor.nbytes)
        if (
            spec is not None
            and len(tensor.shape) == 2
            and (spec.overrides or spec.role_format(checkpoint.family.role(name)))
        ):
            sizes += [form.bits(tensor.shape) for form in spec.weight_formats()]
        bits += min(sizes)
    return bits // 8


def _checked_target(recipe: Recipe, device: str) -> Target:
    """Return the recipe's target. Raises DeviceError, and UsageError for a device that cannot build it."""
    kind, target = available_device(device).type, TARGETS[recipe.target]
    target.check(recipe)
    if kind not in target.devices:
        raise UsageError(
            f"--target {recipe.target} is built on {' or '.join(target.devices)}, not on {device}. Leave --device out, or "
            "build the trainable target for a GPU."
        )
    return target


def _check_outside(output: Path, checkpoint: Checkpoint) -> None:
    """Raise OutputError for an output within the source, which would change it."""
    for source in (checkpoint.source, checkpoint.processor_source):
        if source.directory.resolve() in output.resolve().parents:
            raise OutputError(f"The output {output} lies in the source {source.directory}. Choose another output.")


def trace_program(family: Family, config: Any, progress: Progress) -> Program:
    """Capture and outline all variants of a model, from its config alone."""
    traces = {}
    for name in family.variants(config):
        progress(f"capture {name}", 0, 1)
        traces[name] = capture(family, config, name)
        progress(f"capture {name}", 1, 1)
    return outline(family, family.geometry(config), family.ties(config), traces)


def apply_passes(
    program: Program,
    checkpoint: Checkpoint,
    recipe: Recipe,
    progress: Progress,
    *,
    calibration: Sequence[Batch] = (),
    merge: Merge | None = None,
) -> tuple[tuple[PassReport, ...], dict[str, Decision]]:
    """Run the recipe's passes over a captured program, in place; returns their reports, and the storage of linear layers.

    Raises:
        UsageError: A pattern matches nothing, or the budget cannot be met.
        SourceError: A layer is quantized in another format already, or a weight cannot be measured.
        PassError: A pass failed, or a required one matched nothing.
    """
    able = formats_of_targets()[recipe.target]  # others are dequantized
    stored = {module: form for module, form in checkpoint.formats(program).items() if form.name in able}
    spec = recipe.quantize
    if merge is not None:  # a layer with an adapter is as good as new: it may be stored in any format
        spec = spec or QuantSpec("none")
        stored = {module: form for module, form in stored.items() if not merge.changes(f"{module}.weight")}

    def decisions() -> dict[str, Decision]:
        first = decide(program, spec, stored=stored, published=checkpoint.published)
        if spec is None or spec.budget is None:
            return first
        return within_budget(first, program, checkpoint, spec, recipe, calibration, progress)

    return rewrite(program, recipe, decisions, progress)


def check_passes(recipe: Recipe) -> None:
    """Raise PassError, before any work, for a required pass that the recipe does not have."""
    check_required(passes_for(recipe), _early(recipe))


def _early(recipe: Recipe) -> list[str]:
    """Return the required passes that run before quantization, which depends on the weights."""
    return [name for name in recipe.require if name != QUANTIZE_PASS]


def rewrite(
    program: Program, recipe: Recipe, decisions_for: Callable[[], dict[str, Decision]], progress: Progress
) -> tuple[tuple[PassReport, ...], dict[str, Decision]]:
    """Run the recipe's passes over a program, in place.

    Args:
        program: Captured program.
        recipe: Recipe that selects the passes.
        decisions_for: Called when only quantization is left to do, and says how.
        progress: Called with the number of passes that are done.
    """
    passes = passes_for(recipe)
    progress("passes", 0, len(passes))
    done = iter(range(1, len(passes) + 1))
    reports = run(
        passes, program, require=_early(recipe), on_pass=lambda _: progress("passes", next(done), len(passes))
    )
    decisions = decisions_for()
    quantization = quantization_passes(recipe, decisions)
    if QUANTIZE_PASS in recipe.require and not quantization:
        raise PassError(
            f"Required pass {QUANTIZE_PASS!r} is not part of this build, which quantizes nothing. Add --quantize nf4, or "
            "drop it."
        )
    late = [name for name in recipe.require if name == QUANTIZE_PASS]
    return (*reports, *run(quantization, program, require=late, before=reports)), decisions

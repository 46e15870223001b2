"""Compare merged weights with source and adapter: the same batch through both, one block in memory, in float32."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from vlmbuild.adapters.merge import Merge, read_merge, without_adapter
from vlmbuild.adapters.peft_files import Adapter
from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.errors import BatchError, ParityError, SourceError
from vlmbuild.families import Family, PackedBatch
from vlmbuild.ir import interpret
from vlmbuild.ir.program import Program, Region, join
from vlmbuild.measure import batches
from vlmbuild.measure.calibration import batches_digest
from vlmbuild.passes import adapter_passes, passes_for, quantization_passes
from vlmbuild.quant.decide import Decision
from vlmbuild.recipe import Recipe
from vlmbuild.rewrite.pass_manager import run
from vlmbuild.runtime.bind import instance_tensors
from vlmbuild.runtime.gguf.layout import FILES as GGUF_FILES
from vlmbuild.runtime.gguf.weights import GgufWeights
from vlmbuild.runtime.onnx.session import FOLDER
from vlmbuild.runtime.onnx.weights import OnnxWeights
from vlmbuild.runtime.torch.region import BoundRegion, is_compute
from vlmbuild.util.cpu import single_threaded
from vlmbuild.util.progress import Progress

TOLERANCES = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
"""The relative error of logits up to which merged weights are published, by the dtype that they are stored in. Everything is
computed in float32, so the error is that of rounding the weights once (by 2^-25, 2^-12, 2^-9 of each, at most), which adds up
over tens of layers; in float32 sums in another order come on top."""

SHARE = 0.5
"""Greatest error as a share of the adapter's effect on the logits: above it, merged weights are nearer to those
without the adapter, because it was not merged or because rounding swallows it."""


TensorsOf = Callable[[Region, str], Mapping[str, Tensor]]
"""(region, instance) -> its tensors by module name."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A batch of samples with pictures, made of nothing but a formula and the source's processor.

    Attributes:
        prepared: After the host prologue.
        lengths: Tokens of each sample.
        digest: SHA-256 (hex) of the processor's output.
    """

    prepared: PackedBatch
    lengths: list[int]
    digest: str

    @classmethod
    def of(cls, program: Program, checkpoint: Checkpoint) -> Self:
        """Make the probe for a checkpoint.

        Raises:
            SourceError: The checkpoint has no readable processor, or it does not belong to its config.json.
        """
        processor, directory = checkpoint.processor, checkpoint.source.directory
        rows = next(slot.shape[0] for _, slot in program.slots() if slot.role == "embedding")
        try:
            batch = batches.probe(processor)
            if int(batch["input_ids"].max()) >= rows:
                raise BatchError(f"it makes token {int(batch['input_ids'].max())}, and the model has {rows}.")
            prepared = checkpoint.family.prepare(batch, checkpoint.config, processor)
            return cls(prepared, batch["attention_mask"].sum(-1).tolist(), batches_digest([batch]))
        except Exception as error:  # templates and processors raise whatever they like
            raise SourceError(
                f"The processor in {directory} cannot make a batch of images and texts for this model: {error} The merged "
                "model is compared with the adapter on one, so put the model's own processor and chat template there."
            ) from error


@dataclass(frozen=True, slots=True)
class MergeCheck:
    """An adapter that is merged, and the comparison of the result with source and adapter.

    Attributes:
        checkpoint: The source.
        merge: The adapter.
        captured: A copy of the program before its passes.
        probe: The batch that both sides compute.
    """

    checkpoint: Checkpoint
    merge: Merge
    captured: Program
    probe: Probe

    @classmethod
    def prepare(cls, adapter: str | Path, program: Program, checkpoint: Checkpoint) -> Self:
        """Read an adapter and make the probe, before any work on weights. Raises SourceError."""
        merge = read_merge(adapter, program, checkpoint.family)
        return cls(checkpoint, merge, copy.deepcopy(program), Probe.of(program, checkpoint))

    def measure(
        self, directory: Path, recipe: Recipe, decisions: Mapping[str, Decision], progress: Progress
    ) -> Sequence[Mapping[str, Any]]:
        """Return the manifest's records about the weights in a directory.

        Args:
            directory: Files of weights, complete.
            recipe: Options of the build.
            decisions: Storage of linear layers, by module name.
            progress: Called with "parity", the number of blocks that have run, and the total.

        Raises:
            ParityError: The merged weights compute something else than source and adapter do.
        """
        reference, merged = self._programs(recipe, decisions)
        formats = sorted({recipe.format.name for region in merged.regions.values() for recipe in region.recipes})
        logits = partial(_logits, self.checkpoint, self.probe, progress)
        with _one_thread():
            expected = logits(reference, self._source_tensors(self.merge.adapter), 0)
            before = logits(reference, self._source_tensors(without_adapter(self.merge.adapter)), 1)
            found = logits(merged, _written_tensors(directory, self.checkpoint.family), 2)
        samples = zip(
            *(values.squeeze(0).split(self.probe.lengths) for values in (found, before, expected)), strict=True
        )
        worst = max((_Sample(*sample) for sample in samples), key=lambda sample: sample.error)
        limit = math.inf if formats else _limit(recipe.dtype, worst.effect)
        _check(recipe.dtype, worst.error, worst.effect, limit)
        agreed = int((found.argmax(-1) == expected.argmax(-1)).sum())
        return [
            {
                "case": "merged against source and adapter",
                "batch": self.probe.digest,
                "dtype": recipe.dtype,
                "formats": formats,
                "error": f"{worst.error:.1e}",
                "tolerance": "" if formats else f"{limit:.1e}",
                "effect": f"{worst.effect:.1e}",
                "worst_token": f"{_worst_token(found, expected):.1e}",
                "tokens": found.shape[-2],
                "top1": agreed,
            }
        ]

    def _programs(self, recipe: Recipe, decisions: Mapping[str, Decision]) -> tuple[Program, Program]:
        """Build the unquantized program with slots for the adapter, and the stored one, on kernels that run anywhere."""
        reference = copy.deepcopy(self.captured)
        run(passes_for(replace(recipe, attention="sdpa")), reference)
        merged = copy.deepcopy(reference)
        run(quantization_passes(recipe, decisions), merged)
        run(adapter_passes(self.merge.adapter.loras, frozenset()), reference)
        return reference, merged

    def _source_tensors(self, adapter: Adapter) -> TensorsOf:
        def tensors_of(region: Region, instance: str) -> dict[str, Tensor]:
            names = [join(instance, slot.name) for slot in region.slots if slot.kind != "constant"]
            return {name: self._source_tensor(adapter, name) for name in names}

        return tensors_of

    def _source_tensor(self, adapter: Adapter, name: str) -> Tensor:
        if name in adapter.tensors:
            return adapter.tensors[name].float()
        if name in adapter.trained:
            return adapter.trained[name]
        source = self.checkpoint.tensors[name]
        if len(source.parts) == 1:
            return self.checkpoint.weights.map(source.name)
        return source.whole(self.checkpoint.weights, torch.float32)


def _limit(dtype: str, effect: float) -> float:
    """Return the error up to which weights are published; an adapter without effect has no share to lose."""
    floor = TOLERANCES["float32"] / 10  # what the order of sums may do
    return min(TOLERANCES[dtype], max(SHARE * effect, floor) if effect else math.inf)


def _check(dtype: str, error: float, effect: float, limit: float) -> None:
    if not math.isfinite(error):
        raise ParityError(
            f"The merged weights give NaN or infinity in {dtype}; nothing was published. Merge with --dtype float32, "
            "or repair the source."
        )
    if error > limit:
        raise ParityError(
            f"The merged model's logits differ from those of source and adapter by {error:.1e} (relative); at most "
            f"{limit:.1e} is allowed in {dtype} for an adapter that changes them by {effect:.1e}. Nothing was "
            "published. Merge with --dtype float32; if that fails too, report it."
        )


@torch.no_grad()
def _logits(
    checkpoint: Checkpoint, probe: Probe, progress: Progress, program: Program, tensors_of: TensorsOf, turn: int
) -> Tensor:
    """Compute logits (1, tokens, vocabulary) in float32, with one block's weights in memory at a time."""
    variant = program.variants[probe.prepared.variant]
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in probe.prepared.tensors.items()
    }
    constants = checkpoint.family.constants(checkpoint.config)
    bound = {name: BoundRegion(region, torch.float32, ()) for name, region in program.regions.items()}

    def slots_of(region: Region, instance: str) -> list[Tensor]:
        held = {**tensors_of(region, instance), **constants}
        tensors = [held[join(instance, slot.name)] for slot in region.slots]
        return [x.float() if is_compute(slot) else x for x, slot in zip(tensors, region.slots, strict=True)]

    def run_region(region: Region, slots: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return bound[region.name].run(slots, None, values, training=False)

    def on_call(done: int) -> None:
        progress("parity", turn * len(variant.calls) + done, 3 * len(variant.calls))

    return interpret.run(program, variant, state, slots_of, run_region, on_call=on_call)[variant.output]


def _written_tensors(directory: Path, family: Family) -> TensorsOf:
    """Read the tensors that the files of an artifact stand for, whatever its target."""
    if (directory / FOLDER).is_dir():
        models = OnnxWeights(directory)
        return lambda region, instance: {
            name: models.tensor(name)
            for slot in region.slots
            if slot.kind == "parameter"
            for name in [join(instance, slot.name)]
        }
    if (directory / GGUF_FILES[0]).is_file():
        stored = GgufWeights(directory)
        return lambda region, instance: {
            name: stored.tensor(name)
            for slot in region.slots
            if slot.kind == "parameter"
            for name in [join(instance, slot.name)]
        }
    written = CheckpointWeights(directory)
    return lambda region, instance: dict(instance_tensors(region, instance, family, written))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute sums in one order, so that the figures, and with them the artifact's id, do not depend on the number of
    cores."""
    with single_threaded() as start:
        start()
        yield


class _Sample:
    """Errors of a sample's logits (tokens, vocabulary), as shares of their norm; infinite for NaN, which no comparison finds.

    Attributes:
        error: Difference of the merged weights.
        effect: Difference without the adapter.
    """

    def __init__(self, found: Tensor, before: Tensor, expected: Tensor) -> None:
        self.error, self.effect = (_relative(values, expected) for values in (found, before))


def _relative(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).norm()
    error = float(difference / expected.double().norm())
    return error if math.isfinite(error) else math.inf


def _worst_token(found: Tensor, expected: Tensor) -> float:
    """Return the largest error of a token's logits, as a share of their norm."""
    return float(((found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)).max())

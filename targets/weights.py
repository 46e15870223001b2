"""Bring a source's weights into an artifact: copied, merged, cast, quantized or dequantized, in pieces, on all cores."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmbuild.artifact.weights_writer import SHARD_BYTES, TensorSpec, WeightsWriter
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.checkpoint.tensors import SourceTensor
from vlmbuild.checkpoint.values import ranges, source_values
from vlmbuild.errors import SourceError
from vlmbuild.formats import FourBit
from vlmbuild.quant import bnb_4bit as four_bit
from vlmbuild.quant.bnb_8bit import ROW_FORMAT, quantize_rows
from vlmbuild.quant.bnb_quantize import quantize_blocks
from vlmbuild.targets.request import Request, StoredParameter
from vlmbuild.util.cpu import available_cores, single_threaded

_PIECE = 2**22
"""Elements that are in memory at a time, for each core; a multiple of every block size."""


def stored_specs(request: Request, parameters: Sequence[StoredParameter]) -> list[tuple[TensorSpec, ...]]:
    """The specs of parameters, exactly as in the source for those that are passed through."""
    return [
        _passed_specs(request, parameter) if is_passed(request, parameter) else parameter.specs
        for parameter in parameters
    ]


def write_weights(writer: ArtifactWriter, request: Request, parameters: Sequence[StoredParameter]) -> None:
    """Write the weights of an artifact. Memory does not depend on the model: a few pieces for each core.

    Raises:
        SourceError: A tensor cannot be read or quantized; it is named.
        OutputError: It cannot be written.
    """
    by_tensor = {parameter.specs[0].name: parameter for parameter in parameters}
    progress = _Progress(request, sum(request.tensors[parameter.name].nbytes for parameter in parameters))
    with WeightsWriter(writer, stored_specs(request, parameters), shard_bytes=SHARD_BYTES) as output:
        shards = [[by_tensor[name] for name in names if name in by_tensor] for names in output.shards()]
        jobs = [_Job(request, output, shard, progress) for shard in shards]
        threads = min(available_cores(), len(jobs))
        with single_threaded() as start_thread, ThreadPoolExecutor(threads, initializer=start_thread) as pool:
            try:
                results = pool.map(_Job.run, jobs)
                progress.begun.set()
                for _ in results:
                    pass
            except BaseException:
                progress.stopped.set()
                progress.begun.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise


class _StoppedError(Exception):
    """Ends the other threads when one has failed, or the user interrupts."""


class _Progress:
    """Counts source bytes over all threads."""

    def __init__(self, request: Request, total: int) -> None:
        self.stopped = threading.Event()
        # Set when the pool knows all of its threads: it cannot wait for one that it is just starting.
        self.begun = threading.Event()
        self._tell, self._total, self._done = request.progress, total, 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        if self.stopped.is_set():
            raise _StoppedError
        with self._lock:
            self._done += nbytes
            self._tell("weights", self._done, self._total)


@dataclass(frozen=True, slots=True)
class _Job:
    """One shard."""

    request: Request
    output: WeightsWriter
    parameters: list[StoredParameter]
    progress: _Progress

    def run(self) -> None:
        self.progress.begun.wait()
        for parameter in self.parameters:
            self.progress.add(0)
            source = self.request.tensors[parameter.name]
            if is_passed(self.request, parameter):
                self._pass(source, parameter)
            elif parameter.format is None:
                for piece in self._pieces(source, parameter.name):
                    self.output.append(parameter.specs[0].name, piece)
            elif isinstance(parameter.format, FourBit):
                self._quantize_4bit(source, parameter, parameter.format)
            else:
                self._quantize_8bit(source, parameter)

    def _pass(self, source: SourceTensor, parameter: StoredParameter) -> None:
        for part, spec in zip(source.parts, _passed_specs(self.request, parameter), strict=True):
            if not spec.exact:
                state = self.request.weights.read(part)
                self.output.add(spec.name, state)
                self.progress.add(state.nbytes)
                continue
            for first, count in ranges(math.prod(spec.shape), _PIECE):
                piece = self.request.weights.read_part(part, first, count)
                self.output.append(spec.name, piece)
                self.progress.add(piece.nbytes)

    def _pieces(self, source: SourceTensor, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """A parameter in the recipe's dtype, flat, in pieces of a multiple of so many elements."""
        dtype = getattr(torch, self.request.recipe.dtype)
        for piece in parameter_values(self.request, name, dtype, multiple):
            yield piece.to(dtype)
            self.progress.add(source.nbytes * piece.numel() // math.prod(source.shape))

    def _quantize_4bit(self, source: SourceTensor, parameter: StoredParameter, form: FourBit) -> None:
        absmax = []
        for piece in self._pieces(source, parameter.name):
            values = piece.to(self.request.device)
            packed, scales = quantize_blocks(values, quant_type=form.name, blocksize=form.blocksize)
            if not torch.isfinite(scales).all():
                raise SourceError(
                    f"The tensor {source.name} holds NaN or infinity. Repair the checkpoint, or add it to the skip list."
                )
            self.output.append(parameter.specs[0].name, packed.cpu())
            absmax.append(scales.cpu())
        dtype = getattr(torch, self.request.recipe.dtype)
        for suffix, part in four_bit.quantized_parts(torch.cat(absmax), source.shape, dtype, form).items():
            self.output.add(parameter.specs[0].name + suffix, part)

    def _quantize_8bit(self, source: SourceTensor, parameter: StoredParameter) -> None:
        weight, scb, weight_format = (spec.name for spec in parameter.specs)
        features = source.shape[1]
        for piece in self._pieces(source, parameter.name, features):
            rows, scales = quantize_rows(piece.view(-1, features).to(self.request.device), name=source.name)
            self.output.append(weight, rows.cpu())
            self.output.append(scb, scales.cpu())
        self.output.add(weight_format, torch.tensor(ROW_FORMAT, dtype=torch.uint8))


def is_passed(request: Request, parameter: StoredParameter) -> bool:
    """Whether the source has the parameter in the format that it is stored in, and no adapter changes it."""
    changed = request.merge is not None and request.merge.changes(parameter.name)
    return not changed and parameter.format is not None and request.tensors[parameter.name].format == parameter.format


def parameter_values(request: Request, name: str, dtype: torch.dtype, multiple: int = 1) -> Iterator[Tensor]:
    """What the source has of a parameter, or what becomes of it with an adapter: flat, in pieces of a multiple of so many
    elements. `dtype` is of what int8 stands for."""
    step = max(1, _PIECE // multiple) * multiple
    source, weights, merge = request.tensors[name], request.weights, request.merge
    if merge is None or not merge.changes(name):
        yield from source_values(weights, source, dtype, step)
        return
    trained, first = merge.trained(name), 0
    base = source_values(weights, source, torch.float32, step) if trained is None else trained.flatten().split(step)
    for values in base:
        yield merge.merged(name, values, first)
        first += values.numel()


def _passed_specs(request: Request, parameter: StoredParameter) -> tuple[TensorSpec, ...]:
    """As in the source; only the module's name may be another, if the source has current names. The packed state takes the
    room that one of ours might, so that an artifact made of an artifact is the same."""
    source = request.tensors[parameter.name]
    old, new = source.name.removesuffix(".weight"), parameter.specs[0].name.removesuffix(".weight")
    found = [(new + part.removeprefix(old), request.weights.tensors[part]) for part in source.parts]
    if not isinstance(source.format, FourBit):
        return tuple(TensorSpec(name, info.dtype, info.shape) for name, info in found)
    ours = four_bit.stored_specs(f"{new}.weight", source.shape, source.dtype, source.format)
    specs = [TensorSpec(name, info.dtype, spec.shape) for (name, info), spec in zip(found, ours, strict=True)]
    length = found[-1][1].shape[0]
    longest = max(ours[-1].shape[0], length) if not ours[-1].exact else length
    specs[-1] = replace(specs[-1], shape=(longest,), exact=ours[-1].exact)
    return tuple(specs)

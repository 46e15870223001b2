"""Bring a source's weights into an artifact: copied, merged, cast, quantized or dequantized, in chunks, on all cores."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmbuild.artifact.weights_writer import SHARD_BYTES, TensorSpec, WeightsWriter
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.checkpoint.tensors import SourceTensor
from vlmbuild.formats import WeightFormat, ranges
from vlmbuild.targets.request import Request, StoredParameter
from vlmbuild.util.cpu import available_cores, single_threaded
from vlmbuild.util.pool import cancellable_pool
from vlmbuild.util.validation import cast_finite, require_finite

_CHUNK = 2**22
"""Elements in memory at a time, for each core."""


def stored_specs(request: Request, parameters: Sequence[StoredParameter]) -> list[tuple[TensorSpec, ...]]:
    """Return the specs of parameters, exactly as in the source for parameters that keep their bytes."""
    return [
        _passed_specs(request, parameter) if is_passed(request, parameter) else parameter.specs
        for parameter in parameters
    ]


def write_weights(writer: ArtifactWriter, request: Request, parameters: Sequence[StoredParameter]) -> None:
    """Write the weights of an artifact. Memory does not depend on the model: a few chunks for each core.

    Raises:
        SourceError: A tensor cannot be read or quantized; it is named.
        OutputError: It cannot be written.
    """
    by_tensor = {parameter.specs[0].name: parameter for parameter in parameters}
    total = sum(request.tensors[parameter.name].nbytes for parameter in parameters)
    with WeightsWriter(writer, stored_specs(request, parameters), shard_bytes=SHARD_BYTES) as output:
        shards = [[by_tensor[name] for name in names if name in by_tensor] for names in output.shards()]
        threads = min(available_cores(), len(shards))
        with single_threaded() as start_thread, cancellable_pool(threads, start_thread) as (pool, check):
            progress = _Progress(request, total, check)
            try:
                results = pool.map(_Job.run, [_Job(request, output, shard, progress) for shard in shards])
            finally:
                progress.begun.set()
            for _ in results:
                pass


class _Progress:
    """Counts source bytes over all threads, and ends them when one has failed, or the user interrupts."""

    def __init__(self, request: Request, total: int, check: Callable[[], None]) -> None:
        # Set when the pool knows all of its threads: it cannot wait for one that it is just starting.
        self.begun = threading.Event()
        self._on_progress, self._total, self._done = request.progress, total, 0
        self._check, self._lock = check, threading.Lock()

    def add(self, nbytes: int) -> None:
        self._check()
        with self._lock:
            self._done += nbytes
            self._on_progress("weights", self._done, self._total)


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
                for chunk in self._chunks(source, parameter.name):
                    self.output.append(parameter.specs[0].name, chunk)
            else:
                self._quantize(source, parameter, parameter.format)

    def _pass(self, source: SourceTensor, parameter: StoredParameter) -> None:
        for part, spec in zip(source.parts, _passed_specs(self.request, parameter), strict=True):
            if not spec.exact:
                state = self.request.weights.read(part)
                self.output.add(spec.name, state)
                self.progress.add(state.nbytes)
                continue
            for first, count in ranges(math.prod(spec.shape), _CHUNK):
                chunk = self.request.weights.read_part(part, first, count)
                if chunk.is_floating_point():
                    require_finite(chunk, f"The tensor {part}", "Quantize the checkpoint again.")
                self.output.append(spec.name, chunk)
                self.progress.add(chunk.nbytes)

    def _chunks(self, source: SourceTensor, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """Yield a parameter in the recipe's dtype, flat, in chunks of a multiple of so many elements."""
        for chunk in parameter_values(self.request, name, self.request.dtype, multiple):
            yield cast_finite(chunk, self.request.dtype, source.name, self.request.dtypes)
            self.progress.add(source.nbytes * chunk.numel() // math.prod(source.shape))

    def _quantize(self, source: SourceTensor, parameter: StoredParameter, form: WeightFormat) -> None:
        specs = {spec.name: spec for spec in parameter.specs}
        chunks = self._chunks(source, parameter.name, form.chunk_unit(source.shape))
        on_device = (chunk.to(self.request.device) for chunk in chunks)
        for suffix, part in form.encode(on_device, source.shape, self.request.dtype, source.name):
            spec = specs[parameter.module + suffix]
            (self.output.append if spec.exact else self.output.add)(spec.name, part.cpu())


def is_passed(request: Request, parameter: StoredParameter) -> bool:
    """Return whether a quantized parameter keeps its bytes: it has the right format, and no adapter changes it."""
    changed = request.merge is not None and request.merge.changes(parameter.name)
    return not changed and parameter.format is not None and request.tensors[parameter.name].format == parameter.format


def parameter_values(request: Request, name: str, dtype: torch.dtype, multiple: int = 1) -> Iterator[Tensor]:
    """Yield a parameter of the source, with the adapter merged into it, flat, in chunks of a multiple of so many elements;
    `dtype` is for source formats that store none."""
    step = max(1, _CHUNK // multiple) * multiple
    source, weights, merge = request.tensors[name], request.weights, request.merge
    if merge is None or not merge.changes(name):
        yield from source.values(weights, dtype, step)
        return
    trained, first = merge.trained(name), 0
    base = source.values(weights, torch.float32, step) if trained is None else trained.flatten().split(step)
    for values in base:
        yield merge.merged(name, values, first)
        first += values.numel()


def _passed_specs(request: Request, parameter: StoredParameter) -> tuple[TensorSpec, ...]:
    """Return the specs of a parameter that keeps its bytes.

    Only the module's name may change, if the source has current names. A part whose size is not exact takes the room that
    one of ours might, so that an artifact made of an artifact is the same.
    """
    source = request.tensors[parameter.name]
    assert source.format is not None
    ours = {spec.name: spec for spec in source.format.parts(parameter.module, source.shape, source.dtype)}
    specs = []
    for part in source.parts:
        spec, info = ours[parameter.module + part.removeprefix(source.module)], request.weights.tensors[part]
        if not spec.exact:
            spec = replace(spec, shape=(max(*spec.shape, *info.shape),))
        elif math.prod(spec.shape) != math.prod(info.shape):
            spec = replace(spec, shape=info.shape)
        specs.append(replace(spec, dtype=info.dtype))
    return tuple(specs)

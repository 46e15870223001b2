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
from vlmbuild.errors import ParityError
from vlmbuild.formats import WeightFormat, ranges
from vlmbuild.targets.request import Request, StoredParameter
from vlmbuild.util.cpu import available_cores, single_threaded
from vlmbuild.util.pool import cancellable_pool
from vlmbuild.util.validation import cast_finite, require_finite

_ZEROS = 1.0 + 1e-6
"""Relative error of a weight that is stored as zeros, as tiny values may be."""
_CHUNK = 2**22
"""Elements in memory at a time, for each core."""


def stored_specs(request: Request, parameters: Sequence[StoredParameter]) -> list[tuple[TensorSpec, ...]]:
    """Return the specs of parameters, exactly as in the source for parameters that keep their bytes."""
    return [
        _passed_specs(request, parameter) if is_passed(request, parameter) else parameter.specs
        for parameter in parameters
    ]


class RelativeError:
    """Error of a weight that comes in chunks: the norm of the difference over that of the weight.

    Args:
        name: Name of the weight, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._difference = self._norm = 0.0

    def add(self, values: Tensor, rounded: Tensor) -> None:
        """Count the next values."""
        wide = values.double()
        self._difference += float((wide - rounded.double()).square().sum())
        self._norm += float(wide.square().sum())

    @property
    def value(self) -> float:
        """The error of all values.

        Raises:
            ParityError: It is above that of zeros, which is 1, and which rounding to the nearest value never exceeds.
        """
        if not self._norm:
            return 0.0
        error = math.sqrt(self._difference / self._norm)
        if not error <= _ZEROS:
            raise ParityError(
                f"The weight {self._name} was rounded wrong: the error is {error:.2f} of its norm, and zeros in its place "
                "would have 1. Nothing was published. Choose another format for it, and report this one."
            )
        return error


def write_weights(
    writer: ArtifactWriter, request: Request, parameters: Sequence[StoredParameter], *, losses: bool = False
) -> dict[str, float]:
    """Write the weights of an artifact. Memory does not depend on the model: a few chunks for each core.

    Args:
        writer: Writer of the artifact.
        request: The build.
        parameters: What is stored.
        losses: True quantizes from float32 values, and returns the relative error of each parameter that is quantized here.

    Raises:
        SourceError: A tensor cannot be read or quantized; it is named.
        OutputError: It cannot be written.
    """
    errors: dict[str, float] | None = {} if losses else None
    by_tensor = {parameter.specs[0].name: parameter for parameter in parameters}
    total = sum(request.tensors[parameter.name].nbytes for parameter in parameters)
    with WeightsWriter(writer, stored_specs(request, parameters), shard_bytes=SHARD_BYTES) as output:
        shards = [[by_tensor[name] for name in names if name in by_tensor] for names in output.shards()]
        threads = min(available_cores(), len(shards))
        with single_threaded() as start_thread, cancellable_pool(threads, start_thread) as (pool, check):
            progress = _Progress(request, total, check)
            try:
                results = pool.map(_Job.run, [_Job(request, output, shard, progress, errors) for shard in shards])
            finally:
                progress.begun.set()
            for _ in results:
                pass
    return errors or {}


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
    errors: dict[str, float] | None

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
                    require_finite(
                        chunk if chunk.itemsize > 1 else chunk.float(),
                        f"The tensor {part}",
                        "Quantize the checkpoint again.",
                    )
                self.output.append(spec.name, chunk)
                self.progress.add(chunk.nbytes)

    def _chunks(self, source: SourceTensor, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """Yield a parameter in the recipe's dtype, flat, in chunks of a multiple of so many elements."""
        dtype = self.request.dtype
        for chunk in parameter_values(self.request, name, dtype, multiple):
            yield cast_finite(chunk, dtype, source.name, self.request.dtypes)
            self.progress.add(source.nbytes * chunk.numel() // math.prod(source.shape))

    def _quantize(self, source: SourceTensor, parameter: StoredParameter, form: WeightFormat) -> None:
        if self.errors is not None:
            self._quantize_measured(source, parameter, form, self.errors)
            return
        specs = {spec.name: spec for spec in parameter.specs}
        chunks = self._chunks(source, parameter.name, form.chunk_unit(source.shape))
        on_device = (chunk.to(self.request.device) for chunk in chunks)
        for suffix, part in form.encode(on_device, source.shape, self.request.dtype, source.name):
            spec = specs[parameter.module + suffix]
            (self.output.append if spec.exact else self.output.add)(spec.name, part.cpu())

    def _quantize_measured(
        self, source: SourceTensor, parameter: StoredParameter, form: WeightFormat, errors: dict[str, float]
    ) -> None:
        chunks = parameter_values(self.request, parameter.name, torch.float32, form.chunk_unit(source.shape))
        on_device = (self._in_range(chunk, source).to(self.request.device) for chunk in chunks)
        error = RelativeError(source.name)
        for chunk in form.encode_rounded(on_device, source.shape, self.request.dtype, source.name):
            for suffix, part in chunk.parts.items():
                self.output.append(parameter.module + suffix, part.cpu())
            error.add(chunk.values, chunk.rounded)
            self.progress.add(source.nbytes * chunk.values.numel() // math.prod(source.shape))
        errors[parameter.name] = error.value

    def _in_range(self, chunk: Tensor, source: SourceTensor) -> Tensor:
        """Return wide values whose dequantized ones the recipe's dtype holds."""
        cast_finite(chunk, self.request.dtype, source.name, self.request.dtypes)
        return chunk


def is_passed(request: Request, parameter: StoredParameter) -> bool:
    """Return whether a quantized parameter keeps its bytes: it has the right format, and no adapter changes it."""
    if parameter.format is None or (request.merge is not None and request.merge.changes(parameter.name)):
        return False
    source = request.tensors[parameter.name]
    return source.format == parameter.format or _is_alike(request, source, parameter)


def _is_alike(request: Request, source: SourceTensor, parameter: StoredParameter) -> bool:
    """Return whether a source that is dequantized elsewhere has the tensors that this format stores."""
    if source.dequantized is None or parameter.format is None:
        return False
    if source.dequantized.layout != parameter.format.layout(tuple(source.shape)):
        return False
    stored = {part.removeprefix(source.module): request.weights.tensors[part] for part in source.parts}
    return {suffix: (info.dtype, info.shape) for suffix, info in stored.items()} == {
        spec.name.removeprefix(parameter.module): (spec.dtype, spec.shape) for spec in parameter.specs
    }


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
    form = source.format or parameter.format
    assert form is not None
    ours = {spec.name: spec for spec in form.parts(parameter.module, source.shape, source.dtype)}
    specs = []
    for part in source.parts:
        spec, info = ours[parameter.module + part.removeprefix(source.module)], request.weights.tensors[part]
        if not spec.exact:
            spec = replace(spec, shape=(max(*spec.shape, *info.shape),))
        elif math.prod(spec.shape) != math.prod(info.shape):
            spec = replace(spec, shape=info.shape)
        specs.append(replace(spec, dtype=info.dtype))
    return tuple(specs)

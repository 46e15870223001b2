"""Write the data files: weights stream from the source, a few megabytes at a time, copied, cast or quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vlmbuild.artifact.safetensors import tensor_bytes
from vlmbuild.artifact.writer import ArtifactWriter, OutputFile
from vlmbuild.formats import WeightFormat
from vlmbuild.targets.onnx.graph_builder import Stored
from vlmbuild.targets.onnx.layout import DataFile
from vlmbuild.targets.request import Request
from vlmbuild.targets.weights import RelativeError, parameter_values
from vlmbuild.util.validation import cast_finite


def write_data(
    writer: ArtifactWriter,
    path: str,
    data: DataFile,
    formats: Mapping[str, WeightFormat],
    request: Request,
    on_written: Callable[[int], None],
) -> dict[str, float]:
    """Write one data file, and call `on_written` with the bytes of each parameter; returns the relative error of rounding of
    each quantized parameter: the norm of the difference over that of the weight.

    Raises:
        SourceError: A tensor cannot be read or quantized.
        OutputError: The file cannot be written.
    """
    errors = {}
    with writer.open(path, "weights") as file:
        for name, places in data.parameters.items():
            sink = _Sink(file, places, name, request)
            form = formats.get(name)
            if form is None:
                _plain(sink, name, request)
            else:
                errors[name] = _quantized(sink, name, form, request)
            on_written(sum(stored.length for stored in places.values()))
    return errors


class _Sink:
    """Sink of the next chunks of a parameter's tensors, which lie at different offsets of the file."""

    def __init__(self, file: OutputFile, places: Mapping[str, Stored], name: str, request: Request) -> None:
        self._file, self._name, self._request = file, request.tensors[name].name, request
        self._places = places
        self._done = dict.fromkeys(places, 0)

    def append(self, suffix: str, chunk: Tensor) -> None:
        """Write the next elements."""
        place = self._places[suffix]
        if chunk.is_floating_point() and place.dtype.is_floating_point:
            chunk = cast_finite(chunk, place.dtype, self._name, self._request.dtypes)
        values = chunk.to(place.dtype).contiguous()
        assert self._done[suffix] + values.nbytes <= place.length
        self._file.write_at(tensor_bytes(values), place.offset + self._done[suffix])
        self._done[suffix] += values.nbytes


def _plain(sink: _Sink, name: str, request: Request) -> None:
    for chunk in parameter_values(request, name, torch.float32):
        sink.append("", chunk)


def _quantized(sink: _Sink, name: str, form: WeightFormat, request: Request) -> float:
    """Write a quantized parameter and return its relative error. A source in this format keeps its bytes."""
    source = request.tensors[name]
    if source.format == form and not (request.merge is not None and request.merge.changes(name)):
        stored = form.copy_onnx(request.weights, source.module)
        if stored is not None:
            for suffix, part in stored.items():
                sink.append(suffix, part)
            return 0.0
    error = RelativeError(source.name)
    chunks = parameter_values(request, name, torch.float32, form.chunk_unit(source.shape))
    for chunk in form.encode_onnx(chunks, source.shape, request.dtype, source.name):
        for suffix, part in chunk.parts.items():
            sink.append(suffix, part)
        error.add(chunk.values, chunk.rounded)
    return error.value

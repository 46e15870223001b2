"""Write the data files: weights stream from the source, a few megabytes at a time, copied, cast or quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from vlmbuild.artifact.safetensors import tensor_bytes
from vlmbuild.artifact.writer import ArtifactWriter, OutputFile
from vlmbuild.errors import SourceError
from vlmbuild.formats import BlockInt4, EightBit, FourBit, WeightFormat
from vlmbuild.ops.linear_4bit.dequantize import dequantize_4bit, scales_reference
from vlmbuild.quant.bnb_8bit import quantize_rows
from vlmbuild.quant.bnb_quantize import quantize_blocks, quantize_scales
from vlmbuild.quant.ort_matmul import pack_int4, pack_int8, unpacked_rows
from vlmbuild.targets.onnx.graph import Stored
from vlmbuild.targets.onnx.layout import DataFile
from vlmbuild.targets.request import Request
from vlmbuild.targets.weights import parameter_values


def write_data(
    writer: ArtifactWriter,
    path: str,
    data: DataFile,
    formats: Mapping[str, WeightFormat],
    request: Request,
    told: Callable[[int], None],
) -> dict[str, float]:
    """Write one data file.

    Args:
        writer: Of the artifact.
        path: Where in it.
        data: What lies where.
        formats: Module name -> format of the parameters that are quantized.
        request: Gives the source.
        told: Called with the bytes of each parameter once it is written.

    Returns:
        Module name of a quantized parameter -> the relative error that rounding made: the norm of the difference over that of
        the weight.

    Raises:
        SourceError: A tensor cannot be read or quantized.
        OutputError: The file cannot be written.
    """
    errors = {}
    with writer.open(path, "weights") as file:
        for name, places in data.parameters.items():
            sink = _Sink(file, places)
            form = formats.get(name)
            if form is None:
                _plain(sink, name, request)
            else:
                errors[name] = _quantized(sink, name, form, request)
            told(sum(stored.length for stored in places.values()))
    return errors


class _Sink:
    """Takes the next pieces of a parameter's tensors, which lie at different places of the file."""

    def __init__(self, file: OutputFile, places: Mapping[str, Stored]) -> None:
        self._file = file
        self._places = places
        self._done = dict.fromkeys(places, 0)

    def dtype(self, suffix: str) -> torch.dtype:
        """Of a tensor."""
        return self._places[suffix].dtype

    def append(self, suffix: str, piece: Tensor) -> None:
        """Write the next elements."""
        place = self._places[suffix]
        values = piece.to(place.dtype).contiguous()
        assert self._done[suffix] + values.nbytes <= place.length
        self._file.write_at(tensor_bytes(values), place.offset + self._done[suffix])
        self._done[suffix] += values.nbytes


class _Error:
    """Sums up what rounding does to a weight."""

    def __init__(self) -> None:
        self._difference = self._norm = 0.0

    def add(self, values: Tensor, rounded: Tensor) -> None:
        wide = values.double()
        self._difference += float((wide - rounded.double()).square().sum())
        self._norm += float(wide.square().sum())

    def relative(self) -> float:
        return math.sqrt(self._difference / self._norm) if self._norm else 0.0


def _plain(sink: _Sink, name: str, request: Request) -> None:
    for piece in parameter_values(request, name, torch.float32):
        sink.append("", piece)


def _quantized(sink: _Sink, name: str, form: WeightFormat, request: Request) -> float:
    if isinstance(form, FourBit):
        return _four_bit(sink, name, form, request)
    error, columns = _Error(), request.tensors[name].shape[1]
    for rows, parts in _row_pieces(name, form, columns, sink.dtype("_scales"), request):
        for suffix, part in parts.items():
            sink.append(suffix, part)
        error.add(rows, unpacked_rows(4 if isinstance(form, BlockInt4) else 8, parts, columns))
    return error.relative()


def _row_pieces(
    name: str, form: WeightFormat, columns: int, dtype: torch.dtype, request: Request
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Rows of a weight, and their packed parts."""
    source = request.tensors[name]
    for piece in parameter_values(request, name, torch.float32, columns):
        rows = piece.view(-1, columns).float()
        _check_finite(rows, source.name)
        if isinstance(form, BlockInt4):
            yield rows, pack_int4(rows, form, dtype)
        else:
            assert isinstance(form, EightBit)
            codes, scales = quantize_rows(piece.view(-1, columns), name=source.name)
            yield rows, pack_int8(codes, scales, dtype)


def _four_bit(sink: _Sink, name: str, form: FourBit, request: Request) -> float:
    """bitsandbytes' own bytes; scales in 8 bits become what they stand for. A source in this format keeps its bytes."""
    source, error = request.tensors[name], _Error()
    if source.format == form and not (request.merge is not None and request.merge.changes(name)):
        sink.append("", request.weights.read(source.name).flatten())
        sink.append("_absmax", _source_scales(request, name, form))
        return 0.0
    absmax = []
    for piece in parameter_values(request, name, torch.float32):
        packed, scales = quantize_blocks(piece, quant_type=form.name, blocksize=form.blocksize)
        _check_finite(scales, source.name)
        sink.append("", packed)
        absmax.append(scales)
        rounded = dequantize_4bit(
            packed, scales, None, None, piece.numel(), 1, form.blocksize, form.name, torch.float32
        )
        error.add(piece, rounded.flatten())
    found = torch.cat(absmax)
    if form.double_quant:
        codes, nested, offset = quantize_scales(found)
        found = scales_reference(codes, nested, offset)
    sink.append("_absmax", found)
    return error.relative()


def _source_scales(request: Request, name: str, form: FourBit) -> Tensor:
    source = request.tensors[name]
    absmax = request.weights.read(source.parts[1]).flatten()
    if not form.double_quant:
        return absmax
    nested = request.weights.read(source.parts[3]).flatten()
    return scales_reference(absmax, nested, torch.tensor(source.nested_offset))


def _check_finite(values: Tensor, name: str) -> None:
    if not torch.isfinite(values).all():
        raise SourceError(
            f"The tensor {name} holds NaN or infinity. Repair the checkpoint, or add it to the skip list."
        )

"""The values of a source's parameters, plain or quantized, in pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.checkpoint.tensors import SourceTensor
from vlmbuild.formats import FourBit
from vlmbuild.ops.linear_4bit.dequantize import dequantize_4bit, scales_reference
from vlmbuild.quant.bnb_8bit import dequantize_rows


def source_values(weights: CheckpointWeights, source: SourceTensor, dtype: torch.dtype, step: int) -> Iterator[Tensor]:
    """The values that a parameter stands for, flat, in pieces of at most `step` elements and in memory of their own.

    Args:
        weights: Of the source.
        source: The parameter.
        dtype: Of what int8 stands for; other values have the dtype of the source, or of its quantization state.
        step: A multiple of every block size of 4-bit weights.

    Raises:
        SourceError: A tensor cannot be read.
    """
    if source.format is None:
        for first, count in ranges(math.prod(source.shape), step):
            yield weights.read_part(source.name, first, count)
    elif isinstance(source.format, FourBit):
        yield from _four_bit(weights, source, source.format, step)
    else:
        yield from _eight_bit(weights, source, dtype, step)


def ranges(total: int, step: int) -> Iterator[tuple[int, int]]:
    """(first, count) of consecutive pieces; one empty piece of nothing."""
    for first in range(0, max(total, 1), step):
        yield first, min(step, total - first)


def _eight_bit(weights: CheckpointWeights, source: SourceTensor, dtype: torch.dtype, step: int) -> Iterator[Tensor]:
    features = source.shape[1]
    scales = weights.read(source.parts[1]).flatten()
    for first, count in ranges(math.prod(source.shape), max(1, step // features) * features):
        rows = weights.read_part(source.name, first, count).view(-1, features)
        group = scales[first // features : (first + count) // features]
        yield dequantize_rows(rows, group, dtype, name=source.name).flatten()


def _four_bit(weights: CheckpointWeights, source: SourceTensor, form: FourBit, step: int) -> Iterator[Tensor]:
    size = form.blocksize
    absmax, nested, offset = weights.read(source.parts[1]).flatten(), None, None
    if form.double_quant:
        nested, offset = weights.read(source.parts[3]).flatten(), torch.tensor(source.nested_offset)
    scales = scales_reference(absmax, nested, offset)
    for first, count in ranges(math.prod(source.shape), step):
        packed = weights.read_part(source.name, first // 2, (count + 1) // 2)
        group = scales[first // size : math.ceil((first + count) / size)]
        yield dequantize_4bit(packed, group, None, None, count, 1, size, form.name, source.dtype).flatten()

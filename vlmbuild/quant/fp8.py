"""Source checkpoints in fp8: weights in 8-bit floating point with scales.

Each matrix has scales in `weight_scale_inv`, one for all or one for each block, or one scale in `weight_scale`, as AutoFP8
wrote it. It is dequantized when it is read, as transformers does without a GPU that computes in 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from vlmbuild.formats import StaticShape, unfit
from vlmbuild.quant.dequantized import Dequantized, ReadRows, checked_scales, sharing
from vlmbuild.util.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vlmbuild.artifact.weights_reader import CheckpointWeights
else:
    torch = LazyModule("torch")

SCALES: Final = (".weight_scale_inv", ".weight_scale")
"""Suffixes of a weight's scales; the stored numbers are multiplied by both."""
INPUTS: Final = (".activation_scale", ".input_scale")
"""Suffixes of the scale of a layer's inputs, which is not used: inputs are not quantized here."""


def weights_in(weights: CheckpointWeights, config: Mapping[str, Any]) -> Iterator[Dequantized]:
    """Yield the weights; see `dequantized_weights`."""
    for scale in weights.tensors:
        if scale.endswith(SCALES):
            module = scale.rpartition(".")[0]
            parts = _parts(weights, module, scale, config)
            shape = weights.tensors[parts[0]].shape
            one = math.prod(weights.tensors[scale].shape) == 1
            height, width = shape if one else config["weight_block_size"]
            layout = f"8-bit floats, {sharing(shape, (height, width))}"
            yield Dequantized(module, shape, parts, layout, partial(_open, weights, parts, shape))


def _parts(weights: CheckpointWeights, module: str, scale: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the tensors of a module's weight, the weight first and the scales next."""
    name = f"{module}.weight"
    info, scales = weights.tensors.get(name), weights.tensors[scale]
    if info is None or info.dtype != torch.float8_e4m3fn or len(info.shape) != 2:
        raise unfit(weights, name, f"it is not a matrix of float8_e4m3fn, as its {scale} says")
    if math.prod(scales.shape) != 1 and not _fits(info.shape, scales.shape, config.get("weight_block_size")):
        blocks = f"blocks of {config.get('weight_block_size')}"
        raise unfit(weights, name, f"{scale} has shape {list(scales.shape)} for {list(info.shape)} in {blocks}")
    return (name, scale, *(module + suffix for suffix in INPUTS if module + suffix in weights.tensors))


def _open(weights: CheckpointWeights, parts: tuple[str, ...], shape: StaticShape) -> ReadRows:
    scales = checked_scales(weights, parts[1])
    scales = scales.view(1, 1) if scales.numel() == 1 else scales
    rows_of, columns_of = (size // count for size, count in zip(shape, scales.shape, strict=True))

    def rows(top: int, bottom: int) -> Tensor:
        values = weights.read_part(parts[0], top * shape[1], (bottom - top) * shape[1]).view(-1, shape[1])
        return values.float() * scales[torch.arange(top, bottom) // rows_of].repeat_interleave(columns_of, dim=1)

    return rows


def _fits(shape: StaticShape, scales: StaticShape, block: object) -> bool:
    """Tell whether a weight of this shape is made of whole blocks, one for each scale."""
    if not isinstance(block, list) or len(block) != 2 or len(scales) != 2:
        return False
    return min(scales) > 0 and all(size == count * side for size, count, side in zip(shape, scales, block, strict=True))

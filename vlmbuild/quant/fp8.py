"""Source checkpoints in fp8: weights in 8-bit floating point with scales.

Each matrix has scales in `weight_scale_inv`, one for all or one for each block. It is dequantized when it is read, as
transformers does without a GPU that computes in 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from vlmbuild.errors import SourceError
from vlmbuild.formats import StaticShape, ranges, unfit
from vlmbuild.util.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vlmbuild.artifact.weights_reader import CheckpointWeights
else:
    torch = LazyModule("torch")

METHOD: Final = "fp8"
"""The `quant_method` of such checkpoints."""
SCALE: Final = ".weight_scale_inv"
"""Suffix of a weight's scales, by which the stored numbers are multiplied."""
ACTIVATION: Final = ".activation_scale"
"""Suffix of the scale of a layer's inputs, which is not used: inputs are not quantized here."""


def fp8_parts(weights: CheckpointWeights, module: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the tensors of a module's weight, the weight first and the scales next.

    Args:
        weights: The source.
        module: Name of a module in the files that has scales.
        config: The `quantization_config` of config.json.

    Raises:
        SourceError: They do not fit each other or the blocks of the config.
    """
    name, scale = f"{module}.weight", f"{module}{SCALE}"
    info, scales = weights.tensors.get(name), weights.tensors[scale]
    if info is None or info.dtype != torch.float8_e4m3fn or len(info.shape) != 2:
        raise unfit(weights, name, f"it is not a matrix of float8_e4m3fn, as its {scale} says")
    if scales.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise unfit(weights, name, f"{scale} is {scales.dtype}, and scales are float32, bfloat16 or float16")
    if math.prod(scales.shape) != 1 and not _fits(info.shape, scales.shape, config.get("weight_block_size")):
        blocks = f"blocks of {config.get('weight_block_size')}"
        raise unfit(weights, name, f"{scale} has shape {list(scales.shape)} for {list(info.shape)} in {blocks}")
    activation = f"{module}{ACTIVATION}"
    return (name, scale, *([activation] if activation in weights.tensors else []))


def dequantize_fp8(
    weights: CheckpointWeights, parts: tuple[str, ...], shape: StaticShape, step: int
) -> Iterator[Tensor]:
    """Yield the values of a weight in float32, flat, in chunks of at most `step` elements; `parts` is from `fp8_parts`.

    Raises SourceError for a scale that is negative or not finite, and for tensors that cannot be read.
    """
    name, columns = parts[0], shape[1]
    scales = weights.read(parts[1]).float()
    if not (torch.isfinite(scales) & (scales >= 0)).all():
        raise SourceError(
            f"{weights.directory}: the fp8 weight {name} cannot be used: a scale in {parts[1]} is negative, NaN or infinity. "
            "Download the checkpoint again."
        )
    scales = scales.view(_grid(scales.shape))
    rows_of, columns_of = (size // count for size, count in zip(shape, scales.shape, strict=True))
    for first, count in ranges(math.prod(shape), step):
        rows = torch.arange(first // columns, -(-(first + count) // columns)) // rows_of
        factors = scales[rows].repeat_interleave(columns_of, dim=1).flatten()[first % columns :][:count]
        yield weights.read_part(name, first, count).float() * factors


def _grid(shape: StaticShape) -> tuple[int, int]:
    """Return the rows and columns of blocks that scales of this shape have; one number holds for all."""
    return (1, 1) if math.prod(shape) == 1 else (shape[0], shape[1])


def _fits(shape: StaticShape, scales: StaticShape, block: object) -> bool:
    """Tell whether a weight of this shape is made of whole blocks, one for each scale."""
    if not isinstance(block, list) or len(block) != 2 or len(scales) != 2:
        return False
    return all(size == count * side for size, count, side in zip(shape, scales, block, strict=True))

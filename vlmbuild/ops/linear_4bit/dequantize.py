"""4-bit weights in the bitsandbytes layout (QLoRA, arXiv:2305.14314, section 3): checks and dequantization.

Two values share a byte, the earlier one in the high nibble. Each is an index into a 16-entry table; `blocksize` consecutive
values share a float32 scale. With double quantization the scales are themselves 8-bit indices into bitsandbytes' dynamic map,
scaled per 256 and shifted by one offset.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.formats import BLOCK_SIZES, NESTED_BLOCKSIZE
from vlmbuild.ops.linear_4bit import cpu as linear_4bit_cpu
from vlmbuild.ops.linear_4bit.tables import code_4bit, code_8bit
from vlmbuild.util.dtypes import FLOATS


def check_weight(
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    out_features: int,
    blocksize: int,
    quant_type: str,
    weight_dtype: torch.dtype,
) -> None:
    """Raise UsageError unless every buffer has the size and dtype the geometry needs: kernels do not check.

    Sizes are all that is checked, so this also serves tensors without data.
    """
    if quant_type not in ("nf4", "fp4") or blocksize not in BLOCK_SIZES or weight_dtype not in FLOATS:
        raise UsageError(
            f"linear_4bit: quant_type {quant_type!r}, blocksize {blocksize}, weight_dtype {weight_dtype}; wanted "
            f"'nf4' or 'fp4', one of {BLOCK_SIZES}, and float32, float16 or bfloat16"
        )
    values = in_features * out_features
    blocks = -(-values // blocksize)
    _check_buffer("weight", weight, torch.uint8, (values + 1) // 2)
    if (nested_absmax is None) != (nested_offset is None):
        raise UsageError("linear_4bit: nested_absmax and nested_offset come together, or not at all")
    if nested_absmax is None or nested_offset is None:
        _check_buffer("absmax", absmax, torch.float32, blocks)
        return
    _check_buffer("absmax", absmax, torch.uint8, blocks)
    _check_buffer("nested_absmax", nested_absmax, torch.float32, -(-blocks // NESTED_BLOCKSIZE))
    _check_buffer("nested_offset", nested_offset, torch.float32, 1)


def _check_buffer(name: str, buffer: Tensor, dtype: torch.dtype, size: int) -> None:
    if buffer.dtype != dtype or buffer.numel() != size:
        raise UsageError(
            f"linear_4bit: {name} has {buffer.numel()} elements of {buffer.dtype}; the layer's shape and block size "
            f"need {size} of {dtype}"
        )


def scales_reference(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> Tensor:
    """Compute the float32 scale of every block, in plain torch."""
    if nested_absmax is None or nested_offset is None:
        return absmax
    outer = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    return code_8bit(absmax.device)[absmax.long()] * outer + nested_offset


def dequantize_reference(
    weight: Tensor,
    scales: Tensor,
    in_features: int,
    out_features: int,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the `[out, in]` weight from packed values and float32 scales, in plain torch."""
    packed = weight.flatten()
    nibbles = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[: in_features * out_features]
    values = code_4bit(quant_type, weight.device)[nibbles.long()]
    spread = scales.repeat_interleave(blocksize)[: values.numel()]
    return (values * spread).to(dtype).view(out_features, in_features)


def dequantize_4bit(
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    out_features: int,
    blocksize: int,
    quant_type: str,
    weight_dtype: torch.dtype,
) -> Tensor:
    """Dequantize the `[out_features, in_features]` weight to `weight_dtype`, bit-identical to bitsandbytes' own.

    Args:
        weight: Packed uint8, `ceil(out * in / 2)` elements.
        absmax: Scales, float32 `[blocks]`; uint8 when they are quantized too.
        nested_absmax: Scales of quantized scales, float32 `[ceil(blocks / 256)]`, or None.
        nested_offset: Offset of quantized scales, float32 scalar, or None.

    Raises:
        UsageError: A buffer's size or dtype does not fit.
    """
    check_weight(
        weight, absmax, nested_absmax, nested_offset, in_features, out_features, blocksize, quant_type, weight_dtype
    )
    return dequantize_unchecked(
        weight, absmax, nested_absmax, nested_offset, in_features, out_features, blocksize, quant_type, weight_dtype
    )


def dequantize_unchecked(
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    out_features: int,
    blocksize: int,
    quant_type: str,
    weight_dtype: torch.dtype,
    *,
    reuse: bool = False,
) -> Tensor:
    """Run `dequantize_4bit` unchecked; with `reuse`, on a CPU, possibly in memory that the next such call overwrites."""
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes; slow, so not at the top)

    weight, scales = weight.contiguous(), dense_scales(absmax, nested_absmax, nested_offset).contiguous()
    values = in_features * out_features
    on_cpu = weight.device.type == "cpu"
    # bitsandbytes has no native CPU kernel for these and would compile one per shape; plain torch is ready at once.
    if on_cpu and (values % blocksize or blocksize >= 2048):
        return dequantize_reference(weight, scales, in_features, out_features, blocksize, quant_type, weight_dtype)
    # Its CPU kernel takes the wrong scale where a block runs over the end of a row, so rows are made of whole blocks.
    rows = (values // blocksize, blocksize) if on_cpu and in_features % blocksize else (out_features, in_features)
    dense: Tensor | None = None
    if on_cpu and reuse:
        dense = linear_4bit_cpu.dequantize_into_scratch(weight, scales, rows, blocksize, quant_type, weight_dtype)
    if dense is None:
        dense = torch.ops.bitsandbytes.dequantize_4bit(weight, scales, blocksize, quant_type, rows, weight_dtype)
    return dense.view(out_features, in_features)


def dense_scales(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> Tensor:
    """Compute `scales_reference` by bitsandbytes' kernel."""
    if nested_absmax is None or nested_offset is None:
        return absmax
    import bitsandbytes  # noqa: F401

    code, absmax, outer = code_8bit(absmax.device), absmax.contiguous(), nested_absmax.contiguous()
    scales: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(absmax, outer, code, NESTED_BLOCKSIZE, torch.float32)
    return scales + nested_offset

"""Quantized weights as ONNX Runtime's operators MatMulNBits and MatMulBnb4 read them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmbuild.formats import Buffer, PackedWeight, StaticShape
from vlmbuild.ops.linear_4bit.dequantize import Packed4bit, dequantize_reference

EXACT, INTEGER = 0, 4
"""accuracy_level: products of the input's own values, or of the input rounded to 8 bits in blocks."""


def matmul_nbits(
    bits: int, size: int, level: int, shape: StaticShape, dtype: torch.dtype, *, zero_points: bool = False
) -> PackedWeight:
    """Return the layout of a MatMulNBits weight.

    Its parts are the weight u8 [out, blocks, bytes], scales [out * blocks] in `dtype`, and perhaps zero points u8.

    Args:
        bits: Bits of a code, 4 or 8.
        size: Columns in a block.
        level: `EXACT` or `INTEGER`.
        shape: (out, in).
        dtype: Dtype of scales.
        zero_points: True if each block has a zero point.
    """
    rows, columns = shape
    blocks = -(-columns // size)
    attributes = {"K": columns, "N": rows, "bits": bits, "block_size": size, "accuracy_level": level}
    parts = {
        "": Buffer(torch.uint8, (rows, blocks, size * bits // 8)),
        "_scales": Buffer(dtype, (rows * blocks,)),
    }
    if zero_points:
        parts["_zero_points"] = Buffer(torch.uint8, (rows * -(-blocks // 2),))
    return PackedWeight("MatMulNBits", attributes, parts)


def unpacked(weight: PackedWeight, parts: Mapping[str, Tensor]) -> Tensor:
    """Dequantize a stored weight to float32 [out, in]; `parts` by suffix."""
    attributes = weight.attributes
    rows, columns, size = attributes["N"], attributes["K"], attributes["block_size"]
    if weight.operator == "MatMulBnb4":
        kind = "nf4" if attributes["quant_type"] else "fp4"
        scales = parts["_absmax"].float()
        return dequantize_reference(Packed4bit(parts[""], scales, None, None, columns, rows, size, kind, torch.float32))
    return unpacked_rows(attributes["bits"], parts, columns)


def unpacked_rows(bits: int, parts: Mapping[str, Tensor], columns: int) -> Tensor:
    """Dequantize some rows of MatMulNBits' weight to float32."""
    codes, zero = parts[""], torch.tensor(2.0 ** (bits - 1))
    if bits == 4:
        codes = _apart(codes)
    rows, blocks = codes.shape[:2]
    if "_zero_points" in parts:
        zero = _apart(parts["_zero_points"].view(rows, -1))[:, :blocks, None]
    return ((codes.float() - zero) * parts["_scales"].float().view(rows, blocks, 1)).flatten(1)[:, :columns]


def in_blocks(rows: Tensor, size: int) -> Tensor:
    """Divide rows into blocks [rows, blocks, size], with zeros behind the last column."""
    missing = -rows.shape[1] % size
    return torch.nn.functional.pad(rows, (0, missing)).view(len(rows), -1, size)


def two_a_byte(codes: Tensor) -> Tensor:
    """Pack 4-bit codes along the last dimension, the first one low; an odd one is paired with zero."""
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _apart(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)

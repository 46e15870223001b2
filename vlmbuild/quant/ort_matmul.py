"""Quantized weights as ONNX Runtime's operators read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.formats import BlockInt4, FourBit, WeightFormat
from vlmbuild.ops.linear_4bit.dequantize import dequantize_reference

INT8_BLOCK = 32
"""Columns that share a scale in a weight of 8 bits; all blocks of a row have the row's."""
EXACT, INTEGER = 0, 4
"""accuracy_level: products of the input's own values, or of the input rounded to 8 bits in blocks."""


@dataclass(frozen=True, slots=True)
class PackedPart:
    """One tensor of a packed weight."""

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """How a weight (out, in) is stored.

    Attributes:
        operator: Of ONNX Runtime, that multiplies by it.
        attributes: Of that operator.
        parts: Its tensors, in the order of the operator's inputs.
    """

    operator: str
    attributes: Mapping[str, Any]
    parts: tuple[PackedPart, ...]


def packed_weight(form: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> PackedWeight:
    """The tensors that a weight of this shape becomes.

    int4 and int8 become MatMulNBits: weight u8 [out, blocks, bytes], scales [out * blocks] in the compute dtype, for
    asymmetric blocks zero points u8. nf4 and fp4 become MatMulBnb4, with bitsandbytes' bytes and scales in the compute dtype.

    Raises:
        UsageError: ONNX Runtime cannot multiply by it.
    """
    rows, columns = shape
    if isinstance(form, FourBit):
        if columns % form.blocksize:
            raise UsageError(
                f"{name} has {columns} columns, which {form.name} in blocks of {form.blocksize} does not divide; ONNX Runtime "
                "needs it. Choose a smaller --blocksize, or --quantize int4."
            )
        attributes = {"K": columns, "N": rows, "block_size": form.blocksize, "quant_type": int(form.name == "nf4")}
        count = rows * columns
        parts = (PackedPart("", torch.uint8, (count // 2,)), PackedPart("_absmax", dtype, (count // form.blocksize,)))
        return PackedWeight("MatMulBnb4", attributes, parts)
    bits, size, symmetric = (
        (4, form.blocksize, form.symmetric) if isinstance(form, BlockInt4) else (8, INT8_BLOCK, True)
    )
    blocks = -(-columns // size)
    level = EXACT if isinstance(form, BlockInt4) and form.exact_inputs else INTEGER
    attributes = {"K": columns, "N": rows, "bits": bits, "block_size": size, "accuracy_level": level}
    parts = (
        PackedPart("", torch.uint8, (rows, blocks, size * bits // 8)),
        PackedPart("_scales", dtype, (rows * blocks,)),
        *(() if symmetric else (PackedPart("_zero_points", torch.uint8, (rows * -(-blocks // 2),)),)),
    )
    return PackedWeight("MatMulNBits", attributes, parts)


def pack_int4(rows: Tensor, form: BlockInt4, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parts, by suffix, of float32 [rows, in] in blocks: value = (code - zero point) * scale.

    Codes are 0 to 15, two a byte, the first one low. Symmetric blocks have the zero point 8, and the value of greatest
    magnitude becomes -8 scales. Scales are rounded to `dtype` first, so that codes fit what is stored.
    """
    blocks = _in_blocks(rows, form.blocksize)
    if form.symmetric:
        lowest, highest = blocks.amin(-1), blocks.amax(-1)
        greatest = torch.where(-lowest > highest, lowest, highest)
        scales, zero = (greatest / -8).to(dtype), torch.full_like(lowest, 8)
    else:
        lowest, highest = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        scales = ((highest - lowest) / 15).to(dtype)
        zero = (-lowest / _divisor(scales)).round().clamp(0, 15)
    codes = (blocks / _divisor(scales)[..., None] + zero[..., None]).round().clamp(0, 15).to(torch.uint8)
    parts = {"": _two_a_byte(codes), "_scales": scales.flatten()}
    return parts if form.symmetric else {**parts, "_zero_points": _two_a_byte(_even(zero.to(torch.uint8))).flatten()}


def pack_int8(values: Tensor, scales: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parts of bitsandbytes' int8 [rows, in], which has a scale for each row: codes shifted by 128, and the scale
    of the row for each of its blocks."""
    blocks = _in_blocks(values, INT8_BLOCK)
    codes = (blocks.int() + 128).to(torch.uint8)
    return {"": codes, "_scales": (scales / 127).to(dtype).repeat_interleave(blocks.shape[1])}


def unpacked(weight: PackedWeight, parts: Mapping[str, Tensor]) -> Tensor:
    """The float32 values [out, in] that a stored weight stands for; `parts` by suffix."""
    given = weight.attributes
    rows, columns, size = given["N"], given["K"], given["block_size"]
    if weight.operator == "MatMulBnb4":
        kind = "nf4" if given["quant_type"] else "fp4"
        return dequantize_reference(parts[""], parts["_absmax"].float(), columns, rows, size, kind, torch.float32)
    return unpacked_rows(given["bits"], parts, columns)


def unpacked_rows(bits: int, parts: Mapping[str, Tensor], columns: int) -> Tensor:
    """The float32 values of some rows of MatMulNBits' weight."""
    codes, zero = parts[""], torch.tensor(2.0 ** (bits - 1))
    if bits == 4:
        codes = _apart(codes)
    rows, blocks = codes.shape[:2]
    if "_zero_points" in parts:
        zero = _apart(parts["_zero_points"].view(rows, -1))[:, :blocks, None]
    return ((codes.float() - zero) * parts["_scales"].float().view(rows, blocks, 1)).flatten(1)[:, :columns]


def _in_blocks(rows: Tensor, size: int) -> Tensor:
    """[rows, blocks, size], with zeros behind the last column."""
    missing = -rows.shape[1] % size
    return torch.nn.functional.pad(rows, (0, missing)).view(len(rows), -1, size)


def _divisor(scales: Tensor) -> Tensor:
    """Of blocks of zeros, one."""
    wide = scales.float()
    return torch.where(wide == 0, 1.0, wide)


def _even(codes: Tensor) -> Tensor:
    return torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))


def _two_a_byte(codes: Tensor) -> Tensor:
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _apart(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)

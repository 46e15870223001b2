"""Triton kernels on 4-bit weights: dequantization, and a product that never writes the dequantized weight."""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.ops._triton import INTERPRET, power_of_two, require_device
from vlmbuild.ops.linear_4bit import check_weight, code_4bit, code_8bit


@triton.jit  # type: ignore[untyped-decorator]
def _values(  # type: ignore[no-untyped-def]
    weight, absmax, nested_absmax, nested_offset, code, nested_code, at, ok,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """float32 weights at flat positions `at`: table value times the scale of its block."""
    byte = tl.load(weight + at // 2, mask=ok, other=0).to(tl.int32)
    nibble = tl.where(at % 2 == 0, byte >> 4, byte & 15)
    value = tl.load(code + nibble)
    block = at // BLOCKSIZE
    scale = tl.load(absmax + block, mask=ok, other=0)
    if NESTED:
        outer = tl.load(nested_absmax + block // 256, mask=ok, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * outer + tl.load(nested_offset)
    return value * scale


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    weight, absmax, nested_absmax, nested_offset, code, nested_code, out, size,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    ok = at < size
    value = _values(weight, absmax, nested_absmax, nested_offset, code, nested_code, at, ok, BLOCKSIZE, NESTED)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=ok)


@triton.jit  # type: ignore[untyped-decorator]
def _linear_kernel(  # type: ignore[no-untyped-def]
    x, weight, absmax, nested_absmax, nested_offset, code, nested_code, bias, out, rows, wide, narrow,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1).to(tl.int64) * OUTS + tl.arange(0, OUTS)
    row_ok = row < rows
    feature_ok = feature < wide
    total = tl.zeros([ROWS, OUTS], tl.float32)
    for first in range(0, narrow, INS):
        lane = first + tl.arange(0, INS)
        lane_ok = lane < narrow
        a = tl.load(x + row[:, None] * narrow + lane[None, :], mask=row_ok[:, None] & lane_ok[None, :], other=0.0)
        at = feature[None, :] * narrow + lane[:, None]
        ok = feature_ok[None, :] & lane_ok[:, None]
        w = _values(weight, absmax, nested_absmax, nested_offset, code, nested_code, at, ok, BLOCKSIZE, NESTED)
        # Rounded to the checkpoint's dtype first, as the two-step form does.
        w = tl.where(ok, w, 0.0).to(WEIGHT_DTYPE).to(a.dtype)
        total += tl.dot(a, w, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + feature, mask=feature_ok, other=0.0).to(tl.float32)[None, :]
    target = out + row[:, None] * wide + feature[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=row_ok[:, None] & feature_ok[None, :])


_TRITON_DTYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def _buffers(
    weight: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None, quant_type: str
) -> tuple[Tensor, ...]:
    """The pointers a kernel takes; where scales are not quantized, any tensor stands for those it will not read."""
    code = code_4bit(quant_type, weight.device)
    if nested_absmax is None or nested_offset is None:
        return weight.contiguous(), absmax.contiguous(), absmax, absmax, code, code
    nested_code = code_8bit(weight.device)
    return weight.contiguous(), absmax.contiguous(), nested_absmax.contiguous(), nested_offset, code, nested_code


def dequantize_4bit_triton(
    weight: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None,
    in_features: int, out_features: int, blocksize: int, quant_type: str, weight_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`vlmbuild.ops.linear_4bit.dequantize_4bit` in one launch, double-quantized scales included.

    Raises:
        UsageError: a buffer's size or dtype does not fit.
        DeviceError: the tensors are not where Triton runs.
    """
    check_weight(
        weight, absmax, nested_absmax, nested_offset, in_features, out_features, blocksize, quant_type, weight_dtype
    )
    require_device("linear_4bit", weight)
    out = torch.empty((out_features, in_features), dtype=weight_dtype, device=weight.device)
    tile = 1024
    # Without fusion of products and sums: the scale must round as bitsandbytes' two steps do.
    _dequantize_kernel[(triton.cdiv(out.numel(), tile),)](
        *_buffers(weight, absmax, nested_absmax, nested_offset, quant_type), out, out.numel(),
        BLOCKSIZE=blocksize, NESTED=nested_absmax is not None, TILE=tile, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def linear_4bit_triton(
    input: Tensor, weight: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None,
    bias: Tensor | None, in_features: int, out_features: int, blocksize: int, quant_type: str,
    weight_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`vlmbuild::linear_4bit` with the weight dequantized tile by tile, in registers: for few rows (decoding).

    Raises:
        UsageError: shapes, sizes or dtypes do not fit.
        DeviceError: the tensors are not where Triton runs.
    """
    check_weight(
        weight, absmax, nested_absmax, nested_offset, in_features, out_features, blocksize, quant_type, weight_dtype
    )
    require_device("linear_4bit", weight)
    if input.shape[-1] != in_features or input.dtype not in _TRITON_DTYPES:
        raise UsageError(f"linear_4bit: input of shape {tuple(input.shape)} and {input.dtype}; wanted {in_features}")
    if INTERPRET and torch.bfloat16 in (input.dtype, weight_dtype):
        raise UsageError("linear_4bit: Triton's interpreter cannot multiply bfloat16; use float32 or float16")
    flat = input.reshape(-1, in_features).contiguous()
    rows = flat.shape[0]
    out = input.new_empty((*input.shape[:-1], out_features))
    if out.numel() == 0:
        return out
    tile_rows = min(64, power_of_two(rows, 16))
    grid = (triton.cdiv(rows, tile_rows), triton.cdiv(out_features, 64))
    _linear_kernel[grid](
        flat, *_buffers(weight, absmax, nested_absmax, nested_offset, quant_type),
        absmax if bias is None else bias, out, rows, out_features, in_features,
        BLOCKSIZE=blocksize, NESTED=nested_absmax is not None, BIAS=bias is not None,
        PRECISION="ieee" if input.dtype == torch.float32 else "tf32", WEIGHT_DTYPE=_TRITON_DTYPES[weight_dtype],
        ROWS=tile_rows, OUTS=64, INS=64, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out

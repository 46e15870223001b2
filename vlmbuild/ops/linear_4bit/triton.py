"""Launches the Triton kernels on 4-bit weights: what `vlmbuild::linear_4bit` and its backward run on a GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from vlmbuild.ops.linear_4bit.kernels import dequantize_kernel, grad_input_kernel, linear_kernel, vector_kernel
from vlmbuild.ops.linear_4bit.paths import FUSED_ROWS, has_whole_units, unit_of
from vlmbuild.ops.linear_4bit.tables import code_4bit, code_8bit
from vlmbuild.ops.linear_triton import joined, row_tile, split, tile_parts
from vlmbuild.ops.tiles import tile_of
from vlmbuild.ops.triton_util import INTERPRET, Launch, ceil_div, precision, require_device, target_of

_DTYPES: dict[torch.dtype, Any] = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

Buffers = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""weight, absmax, nested_absmax, nested_offset; see `vlmbuild.ops.linear_4bit.op.dequantize_4bit`."""
Geometry = tuple[int, int, int, str, torch.dtype]
"""in_features, out_features, blocksize, quant_type, weight_dtype."""


def fits(geometry: Geometry, dtype: torch.dtype) -> bool:
    """Whether the kernels take a layer: its rows are whole units, and inputs are of 16 bits, which tensor cores multiply. The
    interpreter cannot multiply bfloat16, but float32."""
    in_features, _, blocksize, _, weight_dtype = geometry
    if INTERPRET and torch.bfloat16 in (dtype, weight_dtype):
        return False
    known = dtype in (torch.float16, torch.bfloat16) or (INTERPRET and dtype == torch.float32)
    return known and has_whole_units(in_features, blocksize)


def _pointers(buffers: Buffers, quant_type: str) -> tuple[Tensor, ...]:
    """The pointers a kernel takes; where scales are not quantized, any tensor stands for those it will not read."""
    weight, absmax, nested_absmax, nested_offset = buffers
    code = code_4bit(quant_type, weight.device)
    if nested_absmax is None or nested_offset is None:
        return weight.contiguous(), absmax.contiguous(), absmax, absmax, code, code
    nested_code = code_8bit(weight.device)
    return weight.contiguous(), absmax.contiguous(), nested_absmax.contiguous(), nested_offset, code, nested_code


def _constants(buffers: Buffers, geometry: Geometry) -> dict[str, Any]:
    _, _, blocksize, _, weight_dtype = geometry
    return {
        "BLOCKSIZE": blocksize,
        "NESTED": buffers[2] is not None,
        "UNIT": unit_of(blocksize),
        "WEIGHT_DTYPE": _DTYPES[weight_dtype],
    }


def _unfused(tile: dict[str, Any]) -> dict[str, Any]:
    """A scale's product and sum round one by one, as bitsandbytes' two steps do."""
    return tile | {"enable_fp_fusion": False}


def linear_launch(
    x: Tensor, buffers: Buffers, bias: Tensor | None, out: Tensor, geometry: Geometry, target: int
) -> Launch:
    """The launch of the product of `x` `[rows, in]` into `out`: `[rows, out]`, or `[parts, rows, out]` in float32."""
    rows, (in_features, out_features, *_, quant_type, _) = x.shape[0], geometry
    tensors = (x, *_pointers(buffers, quant_type), buffers[1] if bias is None else bias, out)
    constants = _constants(buffers, geometry) | {"BIAS": bias is not None}
    if rows == 1 and out.dim() == 2:
        tile = tile_of("linear_4bit_vector", 1, x.dtype, target)
        programs = ceil_div(out_features, tile["OUTS"])
        return Launch(vector_kernel, (programs,), (*tensors, out_features, in_features), constants, _unfused(tile))
    side = row_tile(rows)
    tile = tile_of("linear_4bit", side, x.dtype, target)
    parts = out.shape[0] if out.dim() == 3 else 1
    tiles = ceil_div(ceil_div(in_features, tile["INS"]), parts)
    grid = (ceil_div(rows, side), ceil_div(out_features, tile["OUTS"]), parts)
    sizes = (rows, out_features, in_features, tiles)
    constants |= precision(x.dtype) | {"ROWS": side}
    return Launch(linear_kernel, grid, (*tensors, *sizes), constants, _unfused(tile))


def linear_parts(rows: int, geometry: Geometry, dtype: torch.dtype, target: int) -> int:
    """Into how many parts a product is split, so that a layer with few rows and features fills the GPU."""
    return 1 if rows == 1 else tile_parts("linear_4bit", rows, geometry[1], geometry[0], dtype, target)


def grad_input_launch(grad: Tensor, buffers: Buffers, out: Tensor, geometry: Geometry, target: int) -> Launch:
    """The launch of the gradient for the input, from `grad` `[rows, out]` into `out` `[rows, in]`."""
    rows, (in_features, out_features, *_, quant_type, _) = grad.shape[0], geometry
    side = row_tile(rows)
    tile = tile_of("linear_4bit_grad", side, grad.dtype, target)
    grid = (ceil_div(rows, side), ceil_div(in_features, tile["INS"]))
    arguments = (grad, *_pointers(buffers, quant_type), out, rows, out_features, in_features)
    constants = _constants(buffers, geometry) | precision(grad.dtype) | {"ROWS": side}
    return Launch(grad_input_kernel, grid, arguments, constants, _unfused(tile))


def dequantize_launch(buffers: Buffers, out: Tensor, geometry: Geometry) -> Launch:
    """The launch of dequantization into `out` `[out, in]`."""
    constants = _constants(buffers, geometry)
    units = out.numel() // constants["UNIT"]
    tile = {"UNITS": 32, "num_warps": 4, "num_stages": 1}
    arguments = (*_pointers(buffers, geometry[3]), out, units)
    return Launch(dequantize_kernel, (ceil_div(units, tile["UNITS"]),), arguments, constants, _unfused(tile))


def dequantize_4bit_triton(buffers: Buffers, geometry: Geometry) -> Tensor:
    """`vlmbuild.ops.linear_4bit.op.dequantize_4bit` of a layer that `fits`, in one launch, double-quantized scales included.

    Raises:
        DeviceError: the tensors are not where Triton runs.
    """
    require_device("linear_4bit", buffers[0])
    out = torch.empty((geometry[1], geometry[0]), dtype=geometry[4], device=buffers[0].device)
    dequantize_launch(buffers, out, geometry).run()
    return out


def linear_4bit_triton(input: Tensor, buffers: Buffers, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """`vlmbuild::linear_4bit` of a layer that `fits`: on decoded tiles for up to `FUSED_ROWS` rows, else on a dense weight.

    Raises:
        DeviceError: the tensors are not where Triton runs.
    """
    require_device("linear_4bit", input)
    flat = input.reshape(-1, geometry[0]).contiguous()
    out = input.new_empty((*input.shape[:-1], geometry[1]))
    if out.numel() == 0:
        return out
    if len(flat) > FUSED_ROWS:
        dense = dequantize_4bit_triton(buffers, geometry)
        return F.linear(input, dense.to(input.dtype), None if bias is None else bias.to(input.dtype))
    launch, partial = product_launch(flat, buffers, bias, out.view(len(flat), -1), geometry, target_of(input))
    launch.run()
    return joined(out, partial, bias)


def product_launch(
    x: Tensor, buffers: Buffers, bias: Tensor | None, out: Tensor, geometry: Geometry, target: int
) -> tuple[Launch, Tensor | None]:
    """The launch for these rows `[N, in]`, with the bias into `out` `[N, out]`; or into float32 parts of the result without
    it, `[parts, N, out]`, which are given back to be summed."""
    partial = split(out, linear_parts(len(x), geometry, x.dtype, target))
    if partial is None:
        return linear_launch(x, buffers, bias, out, geometry, target), None
    return linear_launch(x, buffers, None, partial, geometry, target), partial


def grad_input_triton(grad: Tensor, buffers: Buffers, geometry: Geometry) -> Tensor:
    """`vlmbuild::linear_4bit_backward` of a layer that `fits`, without a dequantized weight in memory.

    Raises:
        DeviceError: the tensors are not where Triton runs.
    """
    require_device("linear_4bit", grad)
    flat = grad.reshape(-1, geometry[1]).contiguous()
    out = grad.new_empty((*grad.shape[:-1], geometry[0]))
    if out.numel():
        grad_input_launch(flat, buffers, out.view(len(flat), -1), geometry, target_of(grad)).run()
    return out

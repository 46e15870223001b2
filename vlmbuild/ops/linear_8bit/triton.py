"""Launches the Triton kernels of LLM.int8(): what `vlmbuild::linear_8bit` and its backward run on a GPU.

The input is read twice before the product, for the columns with outliers and for its integers, and written once in a byte a
value. The weight is read in a byte a value, once for every block of rows; no float16 of either, and no dense weight, is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmbuild.ops.linear_8bit.kernels import (
    grad_input_8bit_kernel,
    linear_8bit_kernel,
    outliers_kernel,
    quantize_kernel,
)
from vlmbuild.ops.linear_triton import joined, row_tile, split, tile_parts
from vlmbuild.ops.tiles import tile_of
from vlmbuild.ops.triton_util import INTERPRET, Launch, ceil_div, precision, require_device, target_of

_OUTLIER_COLUMNS = 16
"""Columns that a turn of the outliers' product takes, the fewest that tensor cores do. A layer has a handful."""
_SEARCH = {"ROWS": 16, "INS": 64 if INTERPRET else 256, "num_warps": 4, "num_stages": 1}
_QUANTIZE = {"INS": 64 if INTERPRET else 2048, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
"""A product that is rounded to an integer is first rounded itself, as in bitsandbytes."""


def fits(dtype: torch.dtype) -> bool:
    """Whether the kernels take inputs of this dtype: of 16 bits, or in the interpreter what it can multiply."""
    return dtype in ((torch.float16, torch.float32) if INTERPRET else (torch.float16, torch.bfloat16))


def outliers_launch(x: Tensor, flags: Tensor, threshold: float) -> Launch:
    """The launch of the search for columns of `x` `[rows, in]` with outliers into `flags`, uint8 `[in]`, zero before."""
    rows, narrow = x.shape
    grid = (ceil_div(rows, _SEARCH["ROWS"]), ceil_div(narrow, _SEARCH["INS"]))
    return Launch(outliers_kernel, grid, (x, flags, rows, narrow, threshold), {}, _SEARCH)


def quantize_launch(
    x: Tensor, flags: Tensor | None, quantized: Tensor, row_scales: Tensor, columns: Tensor, threshold: float
) -> Launch:
    """The launch into `quantized`, int8 `[rows, in]`, `row_scales`, float32 `[rows]`, and, unless there are no `flags`,
    `columns`, int32 `[1 + in]`."""
    arguments = (x, columns if flags is None else flags, quantized, row_scales, columns, x.shape[1], threshold)
    return Launch(quantize_kernel, (len(x),), arguments, {"OUTLIERS": flags is not None}, _QUANTIZE)


def linear_8bit_launch(
    x: Tensor,
    quantized: Tensor,
    row_scales: Tensor,
    columns: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    target: int,
    *,
    outliers: bool,
) -> Launch:
    """The launch of the product into `out`: `[rows, out]`, or `[parts, rows, out]` in float32 and without bias."""
    rows, (wide, narrow) = len(x), weight.shape
    side = row_tile(rows)
    tile = tile_of("linear_8bit", side, x.dtype, target)
    parts = out.shape[0] if out.dim() == 3 else 1
    tiles = ceil_div(ceil_div(narrow, tile["INS"]), parts)
    tensors = (x, quantized, row_scales, columns, weight, scales, scales if bias is None else bias, out)
    constants = {"OUTLIERS": outliers, "BIAS": bias is not None, **precision(x.dtype), "ROWS": side}
    grid = (ceil_div(rows, side), ceil_div(wide, tile["OUTS"]), parts)
    return Launch(
        linear_8bit_kernel, grid, (*tensors, rows, wide, narrow, tiles), constants | {"COLUMNS": _OUTLIER_COLUMNS}, tile
    )


def grad_input_8bit_launch(grad: Tensor, weight: Tensor, scales: Tensor, out: Tensor, target: int) -> Launch:
    """The launch of the gradient for the input, from `grad` `[rows, out]` into `out` `[rows, in]`."""
    rows, (wide, narrow) = len(grad), weight.shape
    side = row_tile(rows)
    tile = tile_of("linear_8bit_grad", side, grad.dtype, target)
    grid = (ceil_div(rows, side), ceil_div(narrow, tile["INS"]))
    arguments = (grad, weight, scales, out, rows, wide, narrow)
    return Launch(grad_input_8bit_kernel, grid, arguments, {**precision(grad.dtype), "ROWS": side}, tile)


def parts_8bit(rows: int, weight: Tensor, dtype: torch.dtype, target: int) -> int:
    """Into how many parts a product is split."""
    wide, narrow = weight.shape
    return tile_parts("linear_8bit", rows, wide, narrow, dtype, target)


def quantized_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The integers of `x` `[rows, in]`, its rows' scales, and the columns with outliers: their number, then which."""
    quantized = torch.empty_like(x, dtype=torch.int8)
    row_scales = x.new_empty(x.shape[:1], dtype=torch.float32)
    columns = x.new_empty(1 + x.shape[1], dtype=torch.int32)
    flags = x.new_zeros(x.shape[1], dtype=torch.uint8) if threshold > 0 else None
    if flags is not None:
        outliers_launch(x, flags, threshold).run()
    quantize_launch(x, flags, quantized, row_scales, columns, threshold).run()
    return quantized, row_scales, columns


def linear_8bit_triton(input: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """`vlmbuild::linear_8bit` of an input that `fits`. Sums are float32 and are rounded once.

    Raises:
        DeviceError: the tensors are not where Triton runs.
    """
    require_device("linear_8bit", input)
    x, weight, scales = input.reshape(-1, weight.shape[1]).contiguous(), weight.contiguous(), scales.contiguous()
    out = input.new_empty((*input.shape[:-1], weight.shape[0]))
    if not out.numel():
        return out
    known = (x, *quantized_rows(x, threshold), weight, scales)
    launch, partial = product_8bit_launch(*known, bias, out.view(len(x), -1), target_of(input), outliers=threshold > 0)
    launch.run()
    return joined(out, partial, bias)


def product_8bit_launch(
    x: Tensor,
    quantized: Tensor,
    row_scales: Tensor,
    columns: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    target: int,
    *,
    outliers: bool,
) -> tuple[Launch, Tensor | None]:
    """The launch for these rows `[N, in]`, with the bias into `out` `[N, out]`; or into float32 parts of the result without
    it, `[parts, N, out]`, which are given back to be summed."""
    known = (x, quantized, row_scales, columns, weight, scales)
    partial = split(out, parts_8bit(len(x), weight, x.dtype, target))
    if partial is None:
        return linear_8bit_launch(*known, bias, out, target, outliers=outliers), None
    return linear_8bit_launch(*known, None, partial, target, outliers=outliers), partial


def grad_input_8bit_triton(grad: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """`vlmbuild::linear_8bit_backward` of a gradient that `fits`, without a dequantized weight in memory.

    Raises:
        DeviceError: the tensors are not where Triton runs.
    """
    require_device("linear_8bit", grad)
    flat = grad.reshape(-1, weight.shape[0]).contiguous()
    out = grad.new_empty((*grad.shape[:-1], weight.shape[1]))
    if out.numel():
        weight, scales = weight.contiguous(), scales.contiguous()
        grad_input_8bit_launch(flat, weight, scales, out.view(len(flat), -1), target_of(grad)).run()
    return out

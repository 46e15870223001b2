"""Triton kernels of LoRA (arXiv:2106.09685): products with matrices of few rows, in float32, on tensors that stay as they are.

A layer's result is read and written once. In plain torch its float32 copy, the sum and the cast back are three passes.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def low_kernel(  # type: ignore[no-untyped-def]
    x,
    matrix,
    low,
    rows,
    lanes,
    rank,
    matrix_rank,
    matrix_lane,
    factor,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    RANKS: tl.constexpr,
):
    """`low[row, rank] = factor * sum over lanes of x[row, lane] * matrix[rank, lane]`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    row_ok, place_ok = row < rows, place < rank
    total = tl.zeros([ROWS, RANKS], tl.float32)
    for first in range(0, lanes, LANES):
        lane = first + tl.arange(0, LANES)
        lane_ok = lane < lanes
        a = tl.load(x + row[:, None] * lanes + lane[None, :], mask=row_ok[:, None] & lane_ok[None, :], other=0.0)
        at = place[None, :] * matrix_rank + lane[:, None] * matrix_lane
        m = tl.load(matrix + at, mask=place_ok[None, :] & lane_ok[:, None], other=0.0)
        total = tl.dot(a.to(tl.float32), m.to(tl.float32), total, input_precision=PRECISION)
    tl.store(low + row[:, None] * rank + place[None, :], total * factor, mask=row_ok[:, None] & place_ok[None, :])


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def sum_kernel(  # type: ignore[no-untyped-def]
    base,
    low,
    matrix,
    out,
    rows,
    lanes,
    rank,
    matrix_rank,
    matrix_lane,
    factor,
    BASE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    RANKS: tl.constexpr,
):
    """`out[row, lane] = base[row, lane] + factor * sum over ranks of low[row, rank] * matrix[rank, lane]`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    row_ok, lane_ok = row < rows, lane < lanes
    total = tl.zeros([ROWS, LANES], tl.float32)
    for first in range(0, rank, RANKS):
        place = first + tl.arange(0, RANKS)
        place_ok = place < rank
        a = tl.load(low + row[:, None] * rank + place[None, :], mask=row_ok[:, None] & place_ok[None, :], other=0.0)
        at = place[:, None] * matrix_rank + lane[None, :] * matrix_lane
        m = tl.load(matrix + at, mask=place_ok[:, None] & lane_ok[None, :], other=0.0)
        total = tl.dot(a, m.to(tl.float32), total, input_precision=PRECISION)
    total *= factor
    at = row[:, None] * lanes + lane[None, :]
    ok = row_ok[:, None] & lane_ok[None, :]
    if BASE:
        total += tl.load(base + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def matrix_gradient_kernel(  # type: ignore[no-untyped-def]
    x,
    low,
    out,
    rows,
    lanes,
    rank,
    out_rank,
    out_lane,
    factor,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    RANKS: tl.constexpr,
):
    """`out[rank, lane] = factor * sum over rows of low[row, rank] * x[row, lane]`."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    place = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    lane_ok, place_ok = lane < lanes, place < rank
    total = tl.zeros([LANES, RANKS], tl.float32)
    for first in range(0, rows, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        row_ok = row < rows
        a = tl.load(x + row[:, None] * lanes + lane[None, :], mask=row_ok[:, None] & lane_ok[None, :], other=0.0)
        b = tl.load(low + row[:, None] * rank + place[None, :], mask=row_ok[:, None] & place_ok[None, :], other=0.0)
        total = tl.dot(tl.trans(a.to(tl.float32)), b, total, input_precision=PRECISION)
    at = place[None, :] * out_rank + lane[:, None] * out_lane
    tl.store(out + at, (total * factor).to(out.dtype.element_ty), mask=lane_ok[:, None] & place_ok[None, :])

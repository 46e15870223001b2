"""Triton kernels of LLM.int8() (arXiv:2208.07339, section 3): a row's integers, the product of integers, and its gradient.

The columns with outliers are known after all rows have been looked at, and how many they are stays on the GPU: the product's
kernel reads the number, so that no launch waits for the host. Integers are multiplied by `mma.sync` on sm_80 and sm_100, where
Triton has no newer instruction for them, and by `wgmma` on sm_90.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

_INVERSE = tl.constexpr(1.0 / 127.0)
_ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2**23: added to a smaller float32 and taken away again it leaves the nearest integer, ties to even."""


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def outliers_kernel(  # type: ignore[no-untyped-def]
    x, flags, rows, narrow, threshold, ROWS: tl.constexpr, INS: tl.constexpr
):
    """Set the byte of every column in which a value reaches the threshold; no other byte is written."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.program_id(1) * INS + tl.arange(0, INS)
    ok = (row < rows)[:, None] & (lane < narrow)[None, :]
    value = tl.load(x + row[:, None] * narrow + lane[None, :], mask=ok, other=0.0).to(tl.float16).to(tl.float32)
    found = tl.max((tl.abs(value) >= threshold).to(tl.int32), 0)
    tl.store(flags + lane, found.to(tl.uint8), mask=found > 0)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_kernel(  # type: ignore[no-untyped-def]
    x, flags, quantized, row_scales, columns, narrow, threshold, OUTLIERS: tl.constexpr, INS: tl.constexpr
):
    """One row a program: its largest magnitude below the threshold, and its integers, zero in columns with outliers. The
    first program also writes `columns`: how many those are, and then which."""
    row = tl.program_id(0).to(tl.int64)
    x += row * narrow
    quantized += row * narrow
    top = tl.zeros([INS], tl.float32)
    for first in range(0, narrow, INS):
        lane = first + tl.arange(0, INS)
        value = tl.abs(tl.load(x + lane, mask=lane < narrow, other=0.0).to(tl.float16).to(tl.float32))
        if OUTLIERS:
            value = tl.where(value < threshold, value, 0.0)
        top = tl.maximum(top, value)
    scale = tl.max(top, 0)
    tl.store(row_scales + row, scale)
    factor = tl.div_rn(1.0, tl.where(scale > 0.0, scale, 1.0)) * 127.0  # rounded twice, as torch's own 127 / scale
    for first in range(0, narrow, INS):
        lane = first + tl.arange(0, INS)
        value = tl.load(x + lane, mask=lane < narrow, other=0.0).to(tl.float16).to(tl.float32)
        if OUTLIERS:
            value = tl.where(tl.load(flags + lane, mask=lane < narrow, other=0) == 0, value, 0.0)
        whole = (value * factor + _ROUNDING) - _ROUNDING
        tl.store(quantized + lane, whole.to(tl.int8), mask=lane < narrow)
    if OUTLIERS:  # noqa: SIM102  one is decided when this is compiled, the other when it runs
        if row == 0:
            _list_columns(flags, columns, narrow, INS)


@triton.jit  # type: ignore[untyped-decorator]
def _list_columns(flags, columns, narrow, INS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number of set bytes, then their places."""
    known = 0
    for first in range(0, narrow, INS):
        lane = first + tl.arange(0, INS)
        flag = tl.load(flags + lane, mask=lane < narrow, other=0).to(tl.int32)
        tl.store(columns + 1 + known + tl.cumsum(flag, 0) - flag, lane, mask=flag > 0)
        known += tl.sum(flag, 0)
    tl.store(columns, known)


@triton.jit(do_not_specialize=["rows", "tiles"])  # type: ignore[untyped-decorator]
def linear_8bit_kernel(  # type: ignore[no-untyped-def]
    x,
    quantized,
    row_scales,
    columns,
    weight,
    scales,
    bias,
    out,
    rows,
    wide,
    narrow,
    tiles,
    OUTLIERS: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTS: tl.constexpr,
    INS: tl.constexpr,
):
    """`out[part, row, feature]`: the integers' product over `tiles` tiles of lanes, a part of them a program of the third
    axis; the first part has the outliers' product, too."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1).to(tl.int64) * OUTS + tl.arange(0, OUTS)
    part = tl.program_id(2)
    row_ok, feature_ok = row < rows, feature < wide
    # The weight is the left operand: rows may be few, and tensor cores take no less than 64 of the left one's on sm_90.
    total = tl.zeros([OUTS, ROWS], tl.int32)
    start = part * tiles * INS  # counted in tiles, so that loads are known to be aligned
    for first in range(start, tl.minimum(start + tiles * INS, narrow), INS):
        lane = first + tl.arange(0, INS)
        lane_ok = (lane < narrow)[None, :]
        a = tl.load(quantized + row[:, None] * narrow + lane[None, :], mask=row_ok[:, None] & lane_ok, other=0)
        w = tl.load(weight + feature[:, None] * narrow + lane[None, :], mask=feature_ok[:, None] & lane_ok, other=0)
        total = tl.dot(w, tl.trans(a), total, out_dtype=tl.int32)
    row_scale = tl.load(row_scales + row, mask=row_ok, other=0.0) * _INVERSE
    scale = tl.load(scales + feature, mask=feature_ok, other=0.0) * _INVERSE
    result = total.to(tl.float32) * (scale[:, None] * row_scale[None, :])
    if OUTLIERS:
        count = tl.where(part == 0, tl.load(columns), 0)
        for first in tl.range(0, count, COLUMNS, num_stages=1):
            place = first + tl.arange(0, COLUMNS)
            known = (place < count)[None, :]
            lane = tl.load(columns + 1 + place, mask=place < count, other=0)
            a = tl.load(x + row[:, None] * narrow + lane[None, :], mask=row_ok[:, None] & known, other=0.0)
            w = tl.load(weight + feature[:, None] * narrow + lane[None, :], mask=feature_ok[:, None] & known, other=0)
            dense = (w.to(tl.float32) * scale[:, None]).to(a.dtype)
            result = tl.dot(dense, tl.trans(a), result, input_precision=PRECISION)
    if BIAS:
        result += tl.load(bias + feature, mask=feature_ok, other=0.0).to(tl.float32)[:, None]
    target = out + (part.to(tl.int64) * rows + row)[None, :] * wide + feature[:, None]
    tl.store(target, result.to(out.dtype.element_ty), mask=row_ok[None, :] & feature_ok[:, None])


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def grad_input_8bit_kernel(  # type: ignore[no-untyped-def]
    grad,
    weight,
    scales,
    out,
    rows,
    wide,
    narrow,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    INS: tl.constexpr,
):
    """The gradient for the input: `grad @ (weight * scale / 127)`, ROWS by INS a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.program_id(1) * INS + tl.arange(0, INS)
    row_ok, lane_ok = row < rows, lane < narrow
    total = tl.zeros([ROWS, INS], tl.float32)
    for first in range(0, wide, OUTS):
        feature = (first + tl.arange(0, OUTS)).to(tl.int64)
        ok = feature < wide
        g = tl.load(grad + row[:, None] * wide + feature[None, :], mask=row_ok[:, None] & ok[None, :], other=0.0)
        w = tl.load(weight + feature[:, None] * narrow + lane[None, :], mask=ok[:, None] & lane_ok[None, :], other=0)
        scale = tl.load(scales + feature, mask=ok, other=0.0) * _INVERSE
        total = tl.dot(g, (w.to(tl.float32) * scale[:, None]).to(g.dtype), total, input_precision=PRECISION)
    target = out + row[:, None] * narrow + lane[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=row_ok[:, None] & lane_ok[None, :])

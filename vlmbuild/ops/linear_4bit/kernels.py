"""Triton kernels on 4-bit weights: products that never write the dequantized weight, and dequantization.

A weight's row is cut into units that share a scale: `UNIT` values, no more than a quantization block. Scales that are
quantized themselves are decoded here too. Values are rounded to the checkpoint's dtype before they are multiplied, so
that a product is that of bitsandbytes' dequantized weight.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit  # type: ignore[untyped-decorator]
def _scales(  # type: ignore[no-untyped-def]
    absmax, nested_absmax, nested_offset, nested_code, block, ok, NESTED: tl.constexpr
):
    """The float32 scale of each block."""
    scale = tl.load(absmax + block, mask=ok, other=0)
    if NESTED:
        outer = tl.load(nested_absmax + block // 256, mask=ok, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * outer + tl.load(nested_offset)
    return scale


@triton.jit  # type: ignore[untyped-decorator]
def _pairs(  # type: ignore[no-untyped-def]
    weight,
    absmax,
    nested_absmax,
    nested_offset,
    code,
    nested_code,
    at,
    ok,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
):
    """Earlier and later values of the bytes of UNITS units from flat positions `at` on, `[rows, UNITS, UNIT // 2]`."""
    unit_at = at[:, None] + tl.arange(0, UNITS)[None, :] * UNIT
    scale = _scales(absmax, nested_absmax, nested_offset, nested_code, unit_at // BLOCKSIZE, ok, NESTED)[:, :, None]
    byte_at = unit_at[:, :, None] // 2 + tl.arange(0, UNIT // 2)[None, None, :]
    byte = tl.load(weight + byte_at, mask=ok[:, :, None], other=0).to(tl.int32)
    early = (tl.load(code + (byte >> 4)) * scale).to(WEIGHT_DTYPE)
    late = (tl.load(code + (byte & 15)) * scale).to(WEIGHT_DTYPE)
    return early, late


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    weight,
    absmax,
    nested_absmax,
    nested_offset,
    code,
    nested_code,
    features,
    first,
    wide,
    narrow,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    UNIT: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    OUTS: tl.constexpr,
    INS: tl.constexpr,
):
    """Weights `[OUTS, INS]` from lane `first` on; zero where there are none."""
    units: tl.constexpr = INS // UNIT
    ok = (features < wide)[:, None] & (first + tl.arange(0, units) * UNIT < narrow)[None, :]
    early, late = _pairs(
        weight,
        absmax,
        nested_absmax,
        nested_offset,
        code,
        nested_code,
        features * narrow + first,
        ok,
        BLOCKSIZE,
        NESTED,
        UNIT,
        units,
        WEIGHT_DTYPE,
    )
    values = tl.where(ok[:, :, None, None], tl.join(early, late), 0.0)
    return tl.reshape(values, [OUTS, INS])


@triton.jit(do_not_specialize=["rows", "tiles"])  # type: ignore[untyped-decorator]
def linear_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    absmax,
    nested_absmax,
    nested_offset,
    code,
    nested_code,
    bias,
    out,
    rows,
    wide,
    narrow,
    tiles,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    UNIT: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    INS: tl.constexpr,
):
    """`out[part, row, feature]`: the product over `tiles` tiles of lanes, a part of them a program of the third axis."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1).to(tl.int64) * OUTS + tl.arange(0, OUTS)
    start = tl.program_id(2) * tiles * INS  # counted in tiles, so that loads are known to be aligned
    row_ok = row < rows
    # The weight is the left operand: tensor cores of sm_90 take that one from registers, where it is decoded.
    total = tl.zeros([OUTS, ROWS], tl.float32)
    for first in range(start, tl.minimum(start + tiles * INS, narrow), INS):
        lane = first + tl.arange(0, INS)
        a = tl.load(
            x + row[:, None] * narrow + lane[None, :], mask=row_ok[:, None] & (lane < narrow)[None, :], other=0.0
        )
        w = _tile(
            weight,
            absmax,
            nested_absmax,
            nested_offset,
            code,
            nested_code,
            feature,
            first,
            wide,
            narrow,
            BLOCKSIZE,
            NESTED,
            UNIT,
            WEIGHT_DTYPE,
            OUTS,
            INS,
        )
        total = tl.dot(w.to(a.dtype), tl.trans(a), total, input_precision=PRECISION)
    feature_ok = feature < wide
    if BIAS:
        total += tl.load(bias + feature, mask=feature_ok, other=0.0).to(tl.float32)[:, None]
    target = out + (tl.program_id(2).to(tl.int64) * rows + row)[None, :] * wide + feature[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=row_ok[None, :] & feature_ok[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def vector_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    absmax,
    nested_absmax,
    nested_offset,
    code,
    nested_code,
    bias,
    out,
    wide,
    narrow,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    UNIT: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    OUTS: tl.constexpr,
    INS: tl.constexpr,
):
    """The product with one row: OUTS features a program, in float32 on ordinary units, since memory is what takes the time."""
    units: tl.constexpr = INS // UNIT
    feature = tl.program_id(0).to(tl.int64) * OUTS + tl.arange(0, OUTS)
    feature_ok = feature < wide
    unit = tl.arange(0, units) * UNIT
    place = unit[:, None, None] + tl.arange(0, UNIT // 2)[None, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    total = tl.zeros([OUTS, units, UNIT // 2], tl.float32)
    for first in range(0, narrow, INS):
        unit_ok = first + unit < narrow
        values = tl.load(x + first + place, mask=unit_ok[:, None, None], other=0.0)
        even, odd = tl.split(values.to(tl.float32))
        early, late = _pairs(
            weight,
            absmax,
            nested_absmax,
            nested_offset,
            code,
            nested_code,
            feature * narrow + first,
            feature_ok[:, None] & unit_ok[None, :],
            BLOCKSIZE,
            NESTED,
            UNIT,
            units,
            WEIGHT_DTYPE,
        )
        total = tl.fma(early.to(values.dtype).to(tl.float32), even[None, :, :], total)
        total = tl.fma(late.to(values.dtype).to(tl.float32), odd[None, :, :], total)
    result = tl.sum(tl.sum(total, 2), 1)
    if BIAS:
        result += tl.load(bias + feature, mask=feature_ok, other=0.0).to(tl.float32)
    tl.store(out + feature, result.to(out.dtype.element_ty), mask=feature_ok)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def grad_input_kernel(  # type: ignore[no-untyped-def]
    grad,
    weight,
    absmax,
    nested_absmax,
    nested_offset,
    code,
    nested_code,
    out,
    rows,
    wide,
    narrow,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    INS: tl.constexpr,
):
    """The gradient for the input: `grad @ weight`, ROWS by INS a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * INS
    lane = first + tl.arange(0, INS)
    row_ok = row < rows
    total = tl.zeros([ROWS, INS], tl.float32)
    for first_feature in range(0, wide, OUTS):
        feature = first_feature + tl.arange(0, OUTS)
        at = row[:, None] * wide + feature[None, :]
        g = tl.load(grad + at, mask=row_ok[:, None] & (feature < wide)[None, :], other=0.0)
        w = _tile(
            weight,
            absmax,
            nested_absmax,
            nested_offset,
            code,
            nested_code,
            feature.to(tl.int64),
            first,
            wide,
            narrow,
            BLOCKSIZE,
            NESTED,
            UNIT,
            WEIGHT_DTYPE,
            OUTS,
            INS,
        )
        total = tl.dot(g, w.to(g.dtype), total, input_precision=PRECISION)
    target = out + row[:, None] * narrow + lane[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=row_ok[:, None] & (lane < narrow)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def dequantize_kernel(  # type: ignore[no-untyped-def]
    weight,
    absmax,
    nested_absmax,
    nested_offset,
    code,
    nested_code,
    out,
    units,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    UNIT: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The dense weight, UNITS units a program."""
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    ok = unit < units
    early, late = _pairs(
        weight,
        absmax,
        nested_absmax,
        nested_offset,
        code,
        nested_code,
        unit * UNIT,
        ok[:, None],
        BLOCKSIZE,
        NESTED,
        UNIT,
        1,
        WEIGHT_DTYPE,
    )
    values = tl.reshape(tl.join(early, late), [UNITS, UNIT])
    tl.store(out + unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :], values, mask=ok[:, None])

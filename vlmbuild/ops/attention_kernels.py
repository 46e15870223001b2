"""Triton kernels of attention: blocks of keys pass by with a running softmax (arXiv:2205.14135, arXiv:2307.08691).

One family serves packed segments, groups of keys, causal grouped queries with padding, and dense attention: every row
has a range of keys [start, end), blocks outside the rows' ranges are never visited, and what is left is masked in
registers. Scores, sums and the log-sum-exp are float32 and to base two (`scale` includes log2(e)); a row that sees no key
has +inf there, which makes its probabilities zero in the backward.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit  # type: ignore[untyped-decorator]
def _key_span(  # type: ignore[no-untyped-def]
    starts, ends, rows, row_ok, first_row, length, keys,
    ROWS: tl.constexpr, RANGED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Ranges of keys of a block of rows, one by one and together."""
    if RANGED:
        start = tl.load(starts + rows, mask=row_ok, other=2147483647)
        end = tl.load(ends + rows, mask=row_ok, other=0)
        low = tl.min(start, 0)
        high = tl.max(end, 0)
    else:
        start = tl.zeros([ROWS], tl.int32)
        end = tl.zeros([ROWS], tl.int32) + keys
        low = 0
        high = keys
    if CAUSAL:
        end = tl.minimum(end, rows + (keys - length) + 1)
        high = tl.minimum(high, tl.minimum(first_row + ROWS, length) + keys - length)
    return start, end, low, high


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, key_groups, visible_groups, starts, ends, out, logsumexp,
    query_batch, query_head, query_row, query_lane,
    key_batch, key_head, key_row, key_lane,
    value_batch, value_head, value_row, value_lane,
    mask_batch, mask_key, groups,
    heads, length, keys, scale,
    GQA: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    RANGED: tl.constexpr, MASKED: tl.constexpr, GROUPED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * ROWS
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    kv_head = head // GQA
    rows = first_row + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)
    row_ok = rows < length
    lane_ok = lanes < DIM
    q_at = rows.to(tl.int64)[:, None] * query_row + lanes[None, :] * query_lane
    q = tl.load(
        query + batch * query_batch + head * query_head + q_at, mask=row_ok[:, None] & lane_ok[None, :], other=0.0
    )
    key += batch * key_batch + kv_head * key_head
    value += batch * value_batch + kv_head * value_head
    start, end, low, high = _key_span(starts, ends, rows, row_ok, first_row, length, keys, ROWS, RANGED, CAUSAL)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, LANES], tl.float32)
    for first_key in range(low // KEYS * KEYS, high, KEYS):
        cols = first_key + tl.arange(0, KEYS)
        col_ok = cols < keys
        k_at = cols.to(tl.int64)[None, :] * key_row + lanes[:, None] * key_lane
        k = tl.load(key + k_at, mask=lane_ok[:, None] & col_ok[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        seen = (cols[None, :] >= start[:, None]) & (cols[None, :] < end[:, None])
        if MASKED:
            col_seen = tl.load(key_mask + batch * mask_batch + cols * mask_key, mask=col_ok, other=0)
            seen = seen & (col_seen != 0)[None, :]
        if GROUPED:
            col_group = tl.load(key_groups + cols, mask=col_ok, other=0)
            at = rows.to(tl.int64)[:, None] * groups + col_group[None, :]
            visible = tl.load(visible_groups + at, mask=row_ok[:, None] & col_ok[None, :], other=0)
            seen = seen & (visible != 0)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no key yet has -inf on both sides of the difference.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, 1)
        v_at = cols.to(tl.int64)[:, None] * value_row + lanes[None, :] * value_lane
        v = tl.load(value + v_at, mask=col_ok[:, None] & lane_ok[None, :], other=0.0)
        mixed = mixed * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    some = total > 0.0
    mixed = mixed / tl.where(some, total, 1.0)[:, None]
    # Base two throughout; +inf for an empty row makes its probabilities zero in the backward.
    rest = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    tl.store(logsumexp + (batch * heads + head) * length + rows, rest, mask=row_ok)
    out_at = ((batch * length + rows)[:, None] * heads + head) * DIM + lanes[None, :]
    tl.store(out + out_at, mixed.to(out.dtype.element_ty), mask=row_ok[:, None] & lane_ok[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def grad_query_kernel(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, key_groups, visible_groups, starts, ends, out, logsumexp, grad, delta, grad_query,
    query_batch, query_head, query_row, query_lane,
    key_batch, key_head, key_row, key_lane,
    value_batch, value_head, value_row, value_lane,
    mask_batch, mask_key, groups,
    heads, length, keys, scale, factor,
    GQA: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    RANGED: tl.constexpr, MASKED: tl.constexpr, GROUPED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * ROWS
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    kv_head = head // GQA
    rows = first_row + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)
    row_ok = rows < length
    lane_ok = lanes < DIM
    tile_ok = row_ok[:, None] & lane_ok[None, :]
    q_at = rows.to(tl.int64)[:, None] * query_row + lanes[None, :] * query_lane
    q = tl.load(query + batch * query_batch + head * query_head + q_at, mask=tile_ok, other=0.0)
    out_at = ((batch * length + rows)[:, None] * heads + head) * DIM + lanes[None, :]
    do = tl.load(grad + out_at, mask=tile_ok, other=0.0)
    o = tl.load(out + out_at, mask=tile_ok, other=0.0)
    row_at = (batch * heads + head) * length + rows
    lse = tl.load(logsumexp + row_at, mask=row_ok, other=float("inf"))
    row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    # The key kernel, launched next, reads these.
    tl.store(delta + row_at, row_delta, mask=row_ok)
    key += batch * key_batch + kv_head * key_head
    value += batch * value_batch + kv_head * value_head
    start, end, low, high = _key_span(starts, ends, rows, row_ok, first_row, length, keys, ROWS, RANGED, CAUSAL)
    dq = tl.zeros([ROWS, LANES], tl.float32)
    for first_key in range(low // KEYS * KEYS, high, KEYS):
        cols = first_key + tl.arange(0, KEYS)
        col_ok = cols < keys
        k_at = cols.to(tl.int64)[:, None] * key_row + lanes[None, :] * key_lane
        v_at = cols.to(tl.int64)[:, None] * value_row + lanes[None, :] * value_lane
        k = tl.load(key + k_at, mask=col_ok[:, None] & lane_ok[None, :], other=0.0)
        v = tl.load(value + v_at, mask=col_ok[:, None] & lane_ok[None, :], other=0.0)
        seen = (cols[None, :] >= start[:, None]) & (cols[None, :] < end[:, None])
        if MASKED:
            col_seen = tl.load(key_mask + batch * mask_batch + cols * mask_key, mask=col_ok, other=0)
            seen = seen & (col_seen != 0)[None, :]
        if GROUPED:
            col_group = tl.load(key_groups + cols, mask=col_ok, other=0)
            at = rows.to(tl.int64)[:, None] * groups + col_group[None, :]
            visible = tl.load(visible_groups + at, mask=row_ok[:, None] & col_ok[None, :], other=0)
            seen = seen & (visible != 0)
        scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, float("-inf"))
        p = tl.exp2(scores - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - row_delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    dq_at = (row_at[:, None]) * DIM + lanes[None, :]
    tl.store(grad_query + dq_at, (dq * factor).to(grad_query.dtype.element_ty), mask=tile_ok)


@triton.jit  # type: ignore[untyped-decorator]
def grad_key_kernel(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, key_groups, visible_groups, starts, ends, logsumexp, grad, delta, grad_key, grad_value,
    query_batch, query_head, query_row, query_lane,
    key_batch, key_head, key_row, key_lane,
    value_batch, value_head, value_row, value_lane,
    mask_batch, mask_key, groups,
    heads, length, keys, scale, factor,
    GQA: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    RANGED: tl.constexpr, MASKED: tl.constexpr, GROUPED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // GQA
    first_key = tl.program_id(0) * KEYS
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    cols = first_key + tl.arange(0, KEYS)
    lanes = tl.arange(0, LANES)
    col_ok = cols < keys
    lane_ok = lanes < DIM
    tile_ok = col_ok[:, None] & lane_ok[None, :]
    k_at = cols.to(tl.int64)[:, None] * key_row + lanes[None, :] * key_lane
    v_at = cols.to(tl.int64)[:, None] * value_row + lanes[None, :] * value_lane
    k = tl.load(key + batch * key_batch + kv_head * key_head + k_at, mask=tile_ok, other=0.0)
    v = tl.load(value + batch * value_batch + kv_head * value_head + v_at, mask=tile_ok, other=0.0)
    col_seen = col_ok
    if MASKED:
        col_seen = tl.load(key_mask + batch * mask_batch + cols * mask_key, mask=col_ok, other=0) != 0
    if GROUPED:
        col_group = tl.load(key_groups + cols, mask=col_ok, other=0)
    start, end, low, high = _key_span(starts, ends, cols, col_ok, first_key, length, length, KEYS, RANGED, False)
    if CAUSAL:
        low = tl.maximum(low, first_key - (keys - length))
    dk = tl.zeros([KEYS, LANES], tl.float32)
    dv = tl.zeros([KEYS, LANES], tl.float32)
    for group in range(GQA):
        head = kv_head * GQA + group
        for first_row in range(low // ROWS * ROWS, high, ROWS):
            rows = first_row + tl.arange(0, ROWS)
            row_ok = rows < length
            both = row_ok[:, None] & lane_ok[None, :]
            q_at = rows.to(tl.int64)[:, None] * query_row + lanes[None, :] * query_lane
            q = tl.load(query + batch * query_batch + head * query_head + q_at, mask=both, other=0.0)
            do_at = ((batch * length + rows)[:, None] * heads + head) * DIM + lanes[None, :]
            do = tl.load(grad + do_at, mask=both, other=0.0)
            row_at = (batch * heads + head) * length + rows
            lse = tl.load(logsumexp + row_at, mask=row_ok, other=float("inf"))
            row_delta = tl.load(delta + row_at, mask=row_ok, other=0.0)
            seen = col_seen[:, None] & (rows[None, :] >= start[:, None]) & (rows[None, :] < end[:, None])
            if GROUPED:
                seen_at = rows.to(tl.int64)[None, :] * groups + col_group[:, None]
                visible = tl.load(visible_groups + seen_at, mask=col_ok[:, None] & row_ok[None, :], other=0)
                seen = seen & (visible != 0)
            if CAUSAL:
                seen = seen & (cols[:, None] <= rows[None, :] + (keys - length))
            scores = tl.where(seen, tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale, float("-inf"))
            p = tl.exp2(scores - lse[None, :])
            dv += tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = p * (dp - row_delta[None, :])
            dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    at = (((batch * kv_heads + kv_head) * keys) + cols)[:, None] * DIM + lanes[None, :]
    tl.store(grad_key + at, (dk * factor).to(grad_key.dtype.element_ty), mask=tile_ok)
    tl.store(grad_value + at, dv.to(grad_value.dtype.element_ty), mask=tile_ok)

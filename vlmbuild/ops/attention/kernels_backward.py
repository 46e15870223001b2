"""The Triton kernels of attention backward: one for the query, one for key and value (arXiv:2307.08691, section 3.1.2).

Probabilities are computed again from the log-sum-exp. Each gradient is summed by the program that stores it, in a fixed order,
without atomics: the same inputs give the same bits.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from vlmbuild.ops.attention.kernels_common import (
    edge_blocks,
    group_bit,
    key_bounds,
    load_lanes,
    next_block,
    products,
    row_bounds,
    seen_keys,
    span,
    store_lanes,
    word_keys,
    word_span,
)


@triton.jit  # type: ignore[untyped-decorator]
def _pass_keys(  # type: ignore[no-untyped-def]
    q, q_tail, do, do_tail, lse, row_delta, dq, dq_tail, key, value, key_mask, key_groups, visible_bits,
    group_starts, group_ends, key_row, key_lane, value_row, value_lane, mask_key,
    rows, row_ok, start, end, low, high, first, below, gap, blocks, word, words, length, keys, scale,
    DIM: tl.constexpr, HEAD_DIM: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr, MASKED: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the query gradient of blocks of keys; see the forward's for the blocks."""
    next_key = first
    last_key = first
    if GROUPED:
        next_key, last_key = word_keys(group_starts, group_ends, word, low, high, keys, BLOCK_N)
    for number in range(blocks):
        first_key = next_key if GROUPED else first + number * BLOCK_N
        if EDGE and not GROUPED:
            first_key += tl.where(number >= below, gap, 0)
        cols = first_key + tl.arange(0, BLOCK_N)
        col_ok = cols < keys
        k_at = cols.to(tl.int64) * key_row
        v_at = cols.to(tl.int64) * value_row
        k = load_lanes(key, k_at, key_lane, col_ok, 0, DIM, HEAD_DIM, not EDGE)
        v = load_lanes(value, v_at, value_lane, col_ok, 0, DIM, HEAD_DIM, not EDGE)
        k_tail = k
        v_tail = v
        if TAIL > 0:
            k_tail = load_lanes(key, k_at, key_lane, col_ok, HEAD_DIM, DIM, TAIL, not EDGE)
            v_tail = load_lanes(value, v_at, value_lane, col_ok, HEAD_DIM, DIM, TAIL, not EDGE)
        scores = products(q, q_tail, k, k_tail, TAIL, PRECISION)
        if EDGE:
            seen = seen_keys(
                start,
                end,
                cols,
                col_ok,
                rows,
                row_ok,
                length,
                key_mask,
                mask_key,
                key_groups,
                visible_bits,
                word,
                MASKED,
                GROUPED,
            )
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores * scale - lse[:, None])
        dp = products(do, do_tail, v, v_tail, TAIL, PRECISION)
        ds = (p * (dp - row_delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if TAIL > 0:
            dq_tail = tl.dot(ds, k_tail, dq_tail, input_precision=PRECISION)
        if GROUPED:
            next_key, last_key, word = next_block(
                next_key, last_key, word, group_starts, group_ends, words, low, high, keys, BLOCK_N
            )
    return dq, dq_tail


@triton.jit(do_not_specialize=["mask_batch", "words", "length", "keys"])  # type: ignore[untyped-decorator]
def grad_query_kernel(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, key_groups, visible_bits, group_starts, group_ends, starts, ends,
    out, logsumexp, grad, delta, grad_query,
    query_batch, query_head, query_row, query_lane,
    key_batch, key_head, key_row, key_lane,
    value_batch, value_head, value_row, value_lane,
    mask_batch, mask_key, words, heads, length, keys, scale, factor,
    GQA: tl.constexpr, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, TAIL: tl.constexpr, RANGED: tl.constexpr,
    MASKED: tl.constexpr, GROUPED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the query gradient of BLOCK_M rows of one head, and `delta`, which the other kernel reads."""
    scale, factor = tl.cast(scale, tl.float32), tl.cast(factor, tl.float32)  # inductor passes numbers in 64 bits
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row_ok = rows < length
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // GQA * key_head
    value += batch * value_batch + head // GQA * value_head
    key_mask += batch * mask_batch
    q_at = rows.to(tl.int64) * query_row
    out_at = ((batch * length + rows) * heads + head) * DIM
    row_at = (batch * heads + head) * length + rows
    q = load_lanes(query, q_at, query_lane, row_ok, 0, DIM, HEAD_DIM, False)
    do = load_lanes(grad, out_at, 1, row_ok, 0, DIM, HEAD_DIM, False)
    o = load_lanes(out, out_at, 1, row_ok, 0, DIM, HEAD_DIM, False)
    row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    q_tail = q
    do_tail = do
    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    dq_tail = dq
    if TAIL > 0:
        q_tail = load_lanes(query, q_at, query_lane, row_ok, HEAD_DIM, DIM, TAIL, False)
        do_tail = load_lanes(grad, out_at, 1, row_ok, HEAD_DIM, DIM, TAIL, False)
        o_tail = load_lanes(out, out_at, 1, row_ok, HEAD_DIM, DIM, TAIL, False)
        row_delta += tl.sum(do_tail.to(tl.float32) * o_tail.to(tl.float32), 1)
        dq_tail = tl.zeros([BLOCK_M, TAIL], tl.float32)
    tl.store(delta + row_at, row_delta, mask=row_ok)
    lse = tl.load(logsumexp + row_at, mask=row_ok, other=float("inf"))
    start, end = row_bounds(starts, ends, rows, row_ok, length, keys, BLOCK_M, RANGED, CAUSAL)
    low, high, whole_low, whole_high = span(start, end, row_ok, BLOCK_N, not (MASKED or GROUPED))
    if GROUPED:
        word, blocks = word_span(
            visible_bits, group_starts, group_ends, words, rows, row_ok, low, high, length, keys, BLOCK_N
        )
        dq, dq_tail = _pass_keys(
            q, q_tail, do, do_tail, lse, row_delta, dq, dq_tail, key, value, key_mask, key_groups, visible_bits,
            group_starts, group_ends, key_row, key_lane, value_row, value_lane, mask_key,
            rows, row_ok, start, end, low, high, low, 0, 0, blocks, word, words, length, keys, scale,
            DIM, HEAD_DIM, TAIL, BLOCK_N, True, False, True, PRECISION,
        )  # fmt: skip
    else:
        if not MASKED:
            blocks = (whole_high - whole_low) // BLOCK_N
            dq, dq_tail = _pass_keys(
                q, q_tail, do, do_tail, lse, row_delta, dq, dq_tail, key, value, key_mask, key_groups, visible_bits,
                group_starts, group_ends, key_row, key_lane, value_row, value_lane, mask_key,
                rows, row_ok, start, end, low, high, whole_low, 0, 0, blocks, 0, words, length, keys, scale,
                DIM, HEAD_DIM, TAIL, BLOCK_N, False, False, False, PRECISION,
            )  # fmt: skip
        below, edges = edge_blocks(low, high, whole_low, whole_high, BLOCK_N)
        dq, dq_tail = _pass_keys(
            q, q_tail, do, do_tail, lse, row_delta, dq, dq_tail, key, value, key_mask, key_groups, visible_bits,
            group_starts, group_ends, key_row, key_lane, value_row, value_lane, mask_key,
            rows, row_ok, start, end, low, high, low, below, whole_high - whole_low, edges, 0, words, length, keys, scale,
            DIM, HEAD_DIM, TAIL, BLOCK_N, True, MASKED, False, PRECISION,
        )  # fmt: skip
    dq_at = row_at * DIM
    store_lanes(grad_query, dq_at, row_ok, dq * factor, 0, DIM, HEAD_DIM)
    if TAIL > 0:
        store_lanes(grad_query, dq_at, row_ok, dq_tail * factor, HEAD_DIM, DIM, TAIL)


@triton.jit  # type: ignore[untyped-decorator]
def _pass_rows(  # type: ignore[no-untyped-def]
    k, k_tail, v, v_tail, dk, dk_tail, dv, dv_tail, query, grad, logsumexp, delta, visible_bits,
    query_head, query_row, query_lane, grad_row,
    start, end, col_ok, group, first_word, words, first, below, gap, blocks, length, scale,
    GQA: tl.constexpr, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
    EDGE: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the key and value gradients of blocks of rows, one query head and one word of groups after the other."""
    for number in range(words * GQA * blocks):
        turn = number // blocks
        head = turn % GQA
        block = number - turn * blocks
        first_row = first + block * BLOCK_M
        if EDGE:
            first_row += tl.where(block >= below, gap, 0)
        rows = first_row + tl.arange(0, BLOCK_M)
        row_ok = rows < length
        q_of = query + head * query_head
        do_of = grad + head * DIM
        q_at = rows.to(tl.int64) * query_row
        do_at = rows.to(tl.int64) * grad_row
        q = load_lanes(q_of, q_at, query_lane, row_ok, 0, DIM, HEAD_DIM, not EDGE)
        do = load_lanes(do_of, do_at, 1, row_ok, 0, DIM, HEAD_DIM, not EDGE)
        q_tail = q
        do_tail = do
        if TAIL > 0:
            q_tail = load_lanes(q_of, q_at, query_lane, row_ok, HEAD_DIM, DIM, TAIL, not EDGE)
            do_tail = load_lanes(do_of, do_at, 1, row_ok, HEAD_DIM, DIM, TAIL, not EDGE)
        lse = tl.load(logsumexp + head * length + rows, mask=row_ok, other=float("inf"))
        row_delta = tl.load(delta + head * length + rows, mask=row_ok, other=0.0)
        scores = products(k, k_tail, q, q_tail, TAIL, PRECISION)
        if EDGE:
            if GROUPED:
                word = first_word + turn // GQA
                bits = tl.load(visible_bits + word * length + rows, mask=row_ok, other=0)
                seen = (group_bit(group, word)[:, None] & bits[None, :]) != 0
            else:
                seen = col_ok[:, None] & (rows[None, :] >= start[:, None]) & (rows[None, :] < end[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores * scale - lse[None, :])
        half = p.to(do.dtype)
        dv = tl.dot(half, do, dv, input_precision=PRECISION)
        if TAIL > 0:
            dv_tail = tl.dot(half, do_tail, dv_tail, input_precision=PRECISION)
        dp = products(v, v_tail, do, do_tail, TAIL, PRECISION)
        ds = (p * (dp - row_delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if TAIL > 0:
            dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision=PRECISION)
    return dk, dk_tail, dv, dv_tail


@triton.jit(do_not_specialize=["mask_batch", "words", "length", "keys"])  # type: ignore[untyped-decorator]
def grad_key_kernel(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, key_groups, visible_bits, starts, ends, logsumexp, grad, delta, grad_key, grad_value,
    query_batch, query_head, query_row, query_lane,
    key_batch, key_head, key_row, key_lane,
    value_batch, value_head, value_row, value_lane,
    mask_batch, mask_key, words, heads, length, keys, scale, factor,
    GQA: tl.constexpr, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, TAIL: tl.constexpr, RANGED: tl.constexpr,
    MASKED: tl.constexpr, GROUPED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the key and value gradients of BLOCK_N keys of one key head, summed over its GQA query heads."""
    scale, factor = tl.cast(scale, tl.float32), tl.cast(factor, tl.float32)
    kv_heads = heads // GQA
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    in_range = cols < keys
    k_at = batch * key_batch + kv_head * key_head + cols.to(tl.int64) * key_row
    v_at = batch * value_batch + kv_head * value_head + cols.to(tl.int64) * value_row
    k = load_lanes(key, k_at, key_lane, in_range, 0, DIM, HEAD_DIM, False)
    v = load_lanes(value, v_at, value_lane, in_range, 0, DIM, HEAD_DIM, False)
    k_tail = k
    v_tail = v
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dk_tail = dk
    dv_tail = dv
    if TAIL > 0:
        k_tail = load_lanes(key, k_at, key_lane, in_range, HEAD_DIM, DIM, TAIL, False)
        v_tail = load_lanes(value, v_at, value_lane, in_range, HEAD_DIM, DIM, TAIL, False)
        dk_tail = tl.zeros([BLOCK_N, TAIL], tl.float32)
        dv_tail = tl.zeros([BLOCK_N, TAIL], tl.float32)
    col_ok = in_range
    if MASKED:
        col_ok = tl.load(key_mask + batch * mask_batch + cols * mask_key, mask=in_range, other=0) != 0
    group = cols
    if GROUPED:
        group = tl.load(key_groups + cols, mask=in_range, other=-1)
    start, end = key_bounds(starts, ends, group, in_range, cols, length, keys, BLOCK_N, RANGED, CAUSAL)
    low, high, whole_low, whole_high = span(start, end, in_range, BLOCK_M, not (MASKED or GROUPED))
    head = kv_head * GQA
    query += batch * query_batch + head * query_head
    grad += (batch * length * heads + head) * DIM
    logsumexp += (batch * heads + head) * length
    delta += (batch * heads + head) * length
    below, edges = edge_blocks(low, high, whole_low, whole_high, BLOCK_M)
    if GROUPED:
        first_word = tl.min(tl.where(in_range, group, 2147483647), 0) >> 5
        span_words = (tl.max(group, 0) >> 5) - first_word + 1
        dk, dk_tail, dv, dv_tail = _pass_rows(
            k, k_tail, v, v_tail, dk, dk_tail, dv, dv_tail, query, grad, logsumexp, delta, visible_bits,
            query_head, query_row, query_lane, heads * DIM,
            start, end, col_ok, group, first_word, span_words, low, edges, 0, edges, length, scale,
            GQA, DIM, HEAD_DIM, TAIL, BLOCK_M, True, True, PRECISION,
        )  # fmt: skip
    else:
        if not MASKED:
            blocks = (whole_high - whole_low) // BLOCK_M
            dk, dk_tail, dv, dv_tail = _pass_rows(
                k, k_tail, v, v_tail, dk, dk_tail, dv, dv_tail, query, grad, logsumexp, delta, visible_bits,
                query_head, query_row, query_lane, heads * DIM,
                start, end, col_ok, start, 0, 1, whole_low, 0, 0, blocks, length, scale,
                GQA, DIM, HEAD_DIM, TAIL, BLOCK_M, False, False, PRECISION,
            )  # fmt: skip
        dk, dk_tail, dv, dv_tail = _pass_rows(
            k, k_tail, v, v_tail, dk, dk_tail, dv, dv_tail, query, grad, logsumexp, delta, visible_bits,
            query_head, query_row, query_lane, heads * DIM,
            start, end, col_ok, start, 0, 1, low, below, whole_high - whole_low, edges, length, scale,
            GQA, DIM, HEAD_DIM, TAIL, BLOCK_M, True, False, PRECISION,
        )  # fmt: skip
    at = ((batch * kv_heads + kv_head) * keys + cols) * DIM
    store_lanes(grad_key, at, in_range, dk * factor, 0, DIM, HEAD_DIM)
    store_lanes(grad_value, at, in_range, dv, 0, DIM, HEAD_DIM)
    if TAIL > 0:
        store_lanes(grad_key, at, in_range, dk_tail * factor, HEAD_DIM, DIM, TAIL)
        store_lanes(grad_value, at, in_range, dv_tail, HEAD_DIM, DIM, TAIL)

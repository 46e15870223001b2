"""The Triton kernel of attention forward: blocks of keys pass by with a running softmax (arXiv:2205.14135, arXiv:2307.08691).

Scores and sums are float32. The log-sum-exp is to base two (`scale` includes log2(e)); a row that sees no key has +inf there,
which makes its probabilities zero in the backward.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from vlmbuild.ops.attention.kernels_common import (
    edge_blocks,
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
def pass_keys(  # type: ignore[no-untyped-def]
    q, q_tail, m_i, l_i, acc, acc_tail, key, value, key_mask, key_groups, visible_bits,
    group_starts, group_ends, key_row, key_lane, value_row, value_lane, mask_key,
    rows, row_ok, start, end, low, high, first, below, gap, blocks, word, words, length, keys, scale,
    DIM: tl.constexpr, HEAD_DIM: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr, MASKED: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to blocks of keys from `first` on, with a gap after `below` of them; at an EDGE keys are masked."""
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
        k = load_lanes(key, k_at, key_lane, col_ok, 0, DIM, HEAD_DIM, not EDGE)
        k_tail = k
        if TAIL > 0:
            k_tail = load_lanes(key, k_at, key_lane, col_ok, HEAD_DIM, DIM, TAIL, not EDGE)
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
        m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
        # A row that has seen no key yet has -inf on both sides of the difference.
        base = m_new
        if EDGE:
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores * scale - base[:, None])
        alpha = tl.exp2(m_i - base)
        l_i = l_i * alpha + tl.sum(p, 1)
        v_at = cols.to(tl.int64) * value_row
        v = load_lanes(value, v_at, value_lane, col_ok, 0, DIM, HEAD_DIM, not EDGE)
        half = p.to(v.dtype)
        acc = tl.dot(half, v, acc * alpha[:, None], input_precision=PRECISION)
        if TAIL > 0:
            v_tail = load_lanes(value, v_at, value_lane, col_ok, HEAD_DIM, DIM, TAIL, not EDGE)
            acc_tail = tl.dot(half, v_tail, acc_tail * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
        if GROUPED:
            next_key, last_key, word = next_block(
                next_key, last_key, word, group_starts, group_ends, words, low, high, keys, BLOCK_N
            )
    return m_i, l_i, acc, acc_tail


@triton.jit(do_not_specialize=["mask_batch", "words", "length", "keys"])  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, key_groups, visible_bits, group_starts, group_ends, starts, ends, out, logsumexp,
    query_batch, query_head, query_row, query_lane,
    key_batch, key_head, key_row, key_lane,
    value_batch, value_head, value_row, value_lane,
    mask_batch, mask_key, words, heads, length, keys, scale,
    GQA: tl.constexpr, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, TAIL: tl.constexpr, RANGED: tl.constexpr,
    MASKED: tl.constexpr, GROUPED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M rows of one head: `out` in memory order `[B, S, Hq, D]`, `logsumexp` `[B, Hq, S]`."""
    scale = tl.cast(scale, tl.float32)  # inductor passes numbers in 64 bits
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row_ok = rows < length
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // GQA * key_head
    value += batch * value_batch + head // GQA * value_head
    key_mask += batch * mask_batch
    q_at = rows.to(tl.int64) * query_row
    q = load_lanes(query, q_at, query_lane, row_ok, 0, DIM, HEAD_DIM, False)
    q_tail = q
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    acc_tail = acc
    if TAIL > 0:
        q_tail = load_lanes(query, q_at, query_lane, row_ok, HEAD_DIM, DIM, TAIL, False)
        acc_tail = tl.zeros([BLOCK_M, TAIL], tl.float32)
    start, end = row_bounds(starts, ends, rows, row_ok, length, keys, BLOCK_M, RANGED, CAUSAL)
    low, high, whole_low, whole_high = span(start, end, row_ok, BLOCK_N, not (MASKED or GROUPED))
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if GROUPED:
        word, blocks = word_span(
            visible_bits, group_starts, group_ends, words, rows, row_ok, low, high, length, keys, BLOCK_N
        )
        m_i, l_i, acc, acc_tail = pass_keys(
            q, q_tail, m_i, l_i, acc, acc_tail, key, value, key_mask, key_groups, visible_bits,
            group_starts, group_ends, key_row, key_lane, value_row, value_lane, mask_key,
            rows, row_ok, start, end, low, high, low, 0, 0, blocks, word, words, length, keys, scale,
            DIM, HEAD_DIM, TAIL, BLOCK_N, True, False, True, PRECISION,
        )  # fmt: skip
    else:
        if not MASKED:
            blocks = (whole_high - whole_low) // BLOCK_N
            m_i, l_i, acc, acc_tail = pass_keys(
                q, q_tail, m_i, l_i, acc, acc_tail, key, value, key_mask, key_groups, visible_bits,
                group_starts, group_ends, key_row, key_lane, value_row, value_lane, mask_key,
                rows, row_ok, start, end, low, high, whole_low, 0, 0, blocks, 0, words, length, keys, scale,
                DIM, HEAD_DIM, TAIL, BLOCK_N, False, False, False, PRECISION,
            )  # fmt: skip
        below, edges = edge_blocks(low, high, whole_low, whole_high, BLOCK_N)
        m_i, l_i, acc, acc_tail = pass_keys(
            q, q_tail, m_i, l_i, acc, acc_tail, key, value, key_mask, key_groups, visible_bits,
            group_starts, group_ends, key_row, key_lane, value_row, value_lane, mask_key,
            rows, row_ok, start, end, low, high, low, below, whole_high - whole_low, edges, 0, words, length, keys, scale,
            DIM, HEAD_DIM, TAIL, BLOCK_N, True, MASKED, False, PRECISION,
        )  # fmt: skip
    some = l_i > 0.0
    divisor = tl.where(some, l_i, 1.0)
    # Base two throughout; +inf for an empty row makes its probabilities zero in the backward.
    rest = tl.where(some, m_i + tl.log2(divisor), float("inf"))
    tl.store(logsumexp + (batch * heads + head) * length + rows, rest, mask=row_ok)
    out_at = ((batch * length + rows) * heads + head) * DIM
    store_lanes(out, out_at, row_ok, acc / divisor[:, None], 0, DIM, HEAD_DIM)
    if TAIL > 0:
        store_lanes(out, out_at, row_ok, acc_tail / divisor[:, None], HEAD_DIM, DIM, TAIL)

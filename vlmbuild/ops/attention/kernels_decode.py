"""The Triton kernels of attention of one query row: keys are split among programs, and their results joined (split-K; flash
decoding). The query heads of one key head are the rows of a tile, so that keys and values are read once for all of them.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from vlmbuild.ops.attention.kernels_common import load_lanes, store_lanes
from vlmbuild.ops.attention.kernels_forward import pass_keys


@triton.jit(do_not_specialize=["mask_batch", "keys", "split"])  # type: ignore[untyped-decorator]
def decode_kernel(  # type: ignore[no-untyped-def]
    query, key, value, key_mask, partial, partial_logsumexp,
    query_batch, query_head, query_lane,
    key_batch, key_head, key_row, key_lane,
    value_batch, value_head, value_row, value_lane,
    mask_batch, mask_key, kv_heads, keys, split, scale,
    GQA: tl.constexpr, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend to `split` keys of one key head: float32 `partial` `[parts, B, Hq, D]`, and base-two log-sum-exp `[parts,
    B, Hq]`."""
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    row_ok = rows < GQA
    query += batch * query_batch + kv_head * GQA * query_head
    key += batch * key_batch + kv_head * key_head
    value += batch * value_batch + kv_head * value_head
    key_mask += batch * mask_batch
    q_at = rows.to(tl.int64) * query_head
    q = load_lanes(query, q_at, query_lane, row_ok, 0, DIM, HEAD_DIM, False)
    q_tail = q
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    acc_tail = acc
    if TAIL > 0:
        q_tail = load_lanes(query, q_at, query_lane, row_ok, HEAD_DIM, DIM, TAIL, False)
        acc_tail = tl.zeros([BLOCK_M, TAIL], tl.float32)
    low = tl.program_id(0) * split
    high = tl.minimum(low + split, keys)
    start = tl.zeros([BLOCK_M], tl.int32) + low
    end = tl.zeros([BLOCK_M], tl.int32) + high
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    whole = low
    if not MASKED:
        blocks = tl.maximum(high - low, 0) // BLOCK_N
        whole = low + blocks * BLOCK_N
        m_i, l_i, acc, acc_tail = pass_keys(
            q, q_tail, m_i, l_i, acc, acc_tail, key, value, key_mask, key_mask, key_mask, key_mask, key_mask,
            key_row, key_lane, value_row, value_lane, mask_key,
            rows, row_ok, start, end, low, high, low, 0, 0, blocks, 0, 1, 1, keys, scale,
            DIM, HEAD_DIM, TAIL, BLOCK_N, False, False, False, PRECISION,
        )  # fmt: skip
    edges = tl.cdiv(tl.maximum(high - whole, 0), BLOCK_N)
    m_i, l_i, acc, acc_tail = pass_keys(
        q, q_tail, m_i, l_i, acc, acc_tail, key, value, key_mask, key_mask, key_mask, key_mask, key_mask,
        key_row, key_lane, value_row, value_lane, mask_key,
        rows, row_ok, start, end, low, high, whole, edges, 0, edges, 0, 1, 1, keys, scale,
        DIM, HEAD_DIM, TAIL, BLOCK_N, True, MASKED, False, PRECISION,
    )  # fmt: skip
    divisor = tl.where(l_i > 0.0, l_i, 1.0)
    row_at = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * GQA + rows
    tl.store(partial_logsumexp + row_at, m_i + tl.log2(divisor), mask=row_ok)
    store_lanes(partial, row_at * DIM, row_ok, acc / divisor[:, None], 0, DIM, HEAD_DIM)
    if TAIL > 0:
        store_lanes(partial, row_at * DIM, row_ok, acc_tail / divisor[:, None], HEAD_DIM, DIM, TAIL)


@triton.jit(do_not_specialize=["parts", "rows"])  # type: ignore[untyped-decorator]
def join_kernel(  # type: ignore[no-untyped-def]
    out, partial, partial_logsumexp, logsumexp, parts, rows, DIM: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Join the parts of one row: each counts by its share of the exponentials."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, HEAD_DIM)
    m_i = float("-inf")
    l_i = 0.0
    acc = tl.zeros([HEAD_DIM], tl.float32)
    for part in range(parts):
        at = part * rows + row
        share = tl.load(partial_logsumexp + at)
        m_new = tl.maximum(m_i, share)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, weight = tl.exp2(m_i - base), tl.exp2(share - base)
        l_i = l_i * alpha + weight
        acc = acc * alpha + weight * tl.load(partial + at * DIM + lanes, mask=lanes < DIM, other=0.0)
        m_i = m_new
    some = l_i > 0.0
    divisor = tl.where(some, l_i, 1.0)
    tl.store(logsumexp + row, tl.where(some, m_i + tl.log2(divisor), float("inf")))
    tl.store(out + row * DIM + lanes, (acc / divisor).to(out.dtype.element_ty), mask=lanes < DIM)

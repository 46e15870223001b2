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
    GQA: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """`split` keys of one key head: float32 `partial` `[parts, B, Hq, D]`, and base-two log-sum-exp `[parts, B, Hq]`."""
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    rows = tl.arange(0, ROWS)
    row_ok = rows < GQA
    query += batch * query_batch + kv_head * GQA * query_head
    key += batch * key_batch + kv_head * key_head
    value += batch * value_batch + kv_head * value_head
    key_mask += batch * mask_batch
    q_at = rows.to(tl.int64) * query_head
    q = load_lanes(query, q_at, query_lane, row_ok, 0, DIM, LANES, False)
    q_tail = q
    mixed = tl.zeros([ROWS, LANES], tl.float32)
    mixed_tail = mixed
    if TAIL > 0:
        q_tail = load_lanes(query, q_at, query_lane, row_ok, LANES, DIM, TAIL, False)
        mixed_tail = tl.zeros([ROWS, TAIL], tl.float32)
    low = tl.program_id(0) * split
    high = tl.minimum(low + split, keys)
    start = tl.zeros([ROWS], tl.int32) + low
    end = tl.zeros([ROWS], tl.int32) + high
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    whole = low
    if not MASKED:
        blocks = tl.maximum(high - low, 0) // KEYS
        whole = low + blocks * KEYS
        top, total, mixed, mixed_tail = pass_keys(
            q, q_tail, top, total, mixed, mixed_tail, key, value, key_mask, key_mask, key_mask, key_mask, key_mask,
            key_row, key_lane, value_row, value_lane, mask_key,
            rows, row_ok, start, end, low, high, low, 0, 0, blocks, 0, 1, 1, keys, scale,
            DIM, LANES, TAIL, KEYS, False, False, False, PRECISION,
        )  # fmt: skip
    edges = tl.cdiv(tl.maximum(high - whole, 0), KEYS)
    top, total, mixed, mixed_tail = pass_keys(
        q, q_tail, top, total, mixed, mixed_tail, key, value, key_mask, key_mask, key_mask, key_mask, key_mask,
        key_row, key_lane, value_row, value_lane, mask_key,
        rows, row_ok, start, end, low, high, whole, edges, 0, edges, 0, 1, 1, keys, scale,
        DIM, LANES, TAIL, KEYS, True, MASKED, False, PRECISION,
    )  # fmt: skip
    divisor = tl.where(total > 0.0, total, 1.0)
    row_at = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * GQA + rows
    tl.store(partial_logsumexp + row_at, top + tl.log2(divisor), mask=row_ok)
    store_lanes(partial, row_at * DIM, row_ok, mixed / divisor[:, None], 0, DIM, LANES)
    if TAIL > 0:
        store_lanes(partial, row_at * DIM, row_ok, mixed_tail / divisor[:, None], LANES, DIM, TAIL)


@triton.jit(do_not_specialize=["parts", "rows"])  # type: ignore[untyped-decorator]
def join_kernel(  # type: ignore[no-untyped-def]
    out, partial, partial_logsumexp, logsumexp, parts, rows, DIM: tl.constexpr, LANES: tl.constexpr
):
    """Join the parts of one row: each counts by its share of the exponentials."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    top = float("-inf")
    total = 0.0
    mixed = tl.zeros([LANES], tl.float32)
    for part in range(parts):
        at = part * rows + row
        share = tl.load(partial_logsumexp + at)
        new_top = tl.maximum(top, share)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade, weight = tl.exp2(top - base), tl.exp2(share - base)
        total = total * fade + weight
        mixed = mixed * fade + weight * tl.load(partial + at * DIM + lanes, mask=lanes < DIM, other=0.0)
        top = new_top
    some = total > 0.0
    divisor = tl.where(some, total, 1.0)
    tl.store(logsumexp + row, tl.where(some, top + tl.log2(divisor), float("inf")))
    tl.store(out + row * DIM + lanes, (mixed / divisor).to(out.dtype.element_ty), mask=lanes < DIM)

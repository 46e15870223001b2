"""Triton kernels that prepare masks for attention: the keys of every row's segment, and groups of keys as bits of words.

One launch for segments (`attention.op.row_ranges` in Triton) and two for groups: attention asks for
them at every layer, and launches cost more than the work.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from vlmbuild.ops.triton_util import Launch, ceil_div

_ROWS = 128
_MANY = 1024
_TILE = {"num_warps": 4, "num_stages": 1}


@triton.jit(do_not_specialize=["bounds", "length"])  # type: ignore[untyped-decorator]
def segments_kernel(cu_seqlens, starts, ends, bounds, length, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute first and last-plus-one key of every row, by bisection of the segments' bounds; (0, 0) past the last segment."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    low = tl.zeros([BLOCK_M], tl.int32)
    high = tl.zeros([BLOCK_M], tl.int32) + bounds
    span = bounds
    while span > 0:
        span = span // 2
        middle = (low + high) // 2
        going = low < high
        before = tl.load(cu_seqlens + middle, mask=going, other=0) <= rows
        low = tl.where(going & before, middle + 1, low)
        high = tl.where(going & (before == 0), middle, high)
    inside = (low > 0) & (low < bounds)
    row_ok = rows < length
    start = tl.load(cu_seqlens + low - 1, mask=inside, other=0)
    end = tl.load(cu_seqlens + low, mask=inside, other=0)
    tl.store(starts + rows, start.to(tl.int32), mask=row_ok)
    tl.store(ends + rows, end.to(tl.int32), mask=row_ok)


@triton.jit(do_not_specialize=["groups", "length", "keys"])  # type: ignore[untyped-decorator]
def groups_kernel(  # type: ignore[no-untyped-def]
    key_groups, visible_groups, first_key, last_key, first_row, last_row, groups, length, keys, MANY: tl.constexpr
):
    """Compute first and last-plus-one key of one group, and first and last-plus-one row that sees it."""
    group = tl.program_id(0)
    low = tl.full([MANY], 2147483647, tl.int32)
    high = tl.zeros([MANY], tl.int32)
    for first in range(0, keys, MANY):
        index = first + tl.arange(0, MANY)
        own = tl.load(key_groups + index, mask=index < keys, other=-1) == group
        low = tl.minimum(low, tl.where(own, index, 2147483647))
        high = tl.maximum(high, tl.where(own, index + 1, 0))
    tl.store(first_key + group, tl.minimum(tl.min(low, 0), keys))
    tl.store(last_key + group, tl.max(high, 0))
    low = tl.full([MANY], 2147483647, tl.int32)
    high = tl.zeros([MANY], tl.int32)
    if group < groups:
        for first in range(0, length, MANY):
            index = first + tl.arange(0, MANY)
            at = index.to(tl.int64) * groups + group
            own = tl.load(visible_groups + at, mask=index < length, other=0) != 0
            low = tl.minimum(low, tl.where(own, index, 2147483647))
            high = tl.maximum(high, tl.where(own, index + 1, 0))
    tl.store(first_row + group, tl.minimum(tl.min(low, 0), length))
    tl.store(last_row + group, tl.max(high, 0))


@triton.jit(do_not_specialize=["groups", "words", "length", "keys"])  # type: ignore[untyped-decorator]
def words_kernel(  # type: ignore[no-untyped-def]
    visible_groups, first_key, last_key, bits, starts, ends, groups, words, length, keys, BLOCK_M: tl.constexpr
):
    """Compute the groups that every row sees, a bit a group, and the first and last-plus-one key of these."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < length
    start = tl.zeros([BLOCK_M], tl.int32) + keys
    end = tl.zeros([BLOCK_M], tl.int32)
    for word in range(words):
        bit = tl.arange(0, 32)
        group = word * 32 + bit
        at = rows.to(tl.int64)[:, None] * groups + group[None, :]
        seen = tl.load(visible_groups + at, mask=row_ok[:, None] & (group < groups)[None, :], other=0) != 0
        # Distinct bits: their sum is their union, and the top one wraps to the sign.
        union = tl.sum(tl.where(seen, (1 << bit)[None, :], 0), 1)
        tl.store(bits + word * length + rows, union, mask=row_ok)
        start = tl.minimum(start, tl.min(tl.where(seen, tl.load(first_key + group)[None, :], keys), 1))
        end = tl.maximum(end, tl.max(tl.where(seen, tl.load(last_key + group)[None, :], 0), 1))
    tl.store(starts + rows, start, mask=row_ok)
    tl.store(ends + rows, end, mask=row_ok)


def segments_launch(cu_seqlens: Tensor, starts: Tensor, ends: Tensor) -> Launch:
    """Return the launch into int32 `starts` and `ends`, `[S]`."""
    bounds, length = cu_seqlens.shape[0], starts.shape[0]
    programs = ceil_div(length, _ROWS)
    arguments = (cu_seqlens, starts, ends, bounds, length)
    return Launch(segments_kernel, (programs,), arguments, {}, {"BLOCK_M": _ROWS, **_TILE})


def groups_launches(
    key_groups: Tensor, visible: Tensor, group_spans: Tensor, bits: Tensor, row_spans: Tensor
) -> tuple[Launch, Launch]:
    """Return the launches into `group_spans` `[4, 32 * words]`, `bits` `[words, S]` and `row_spans` `[2, S]`, all
    int32, in order.

    Args:
        key_groups: Contiguous integers `[T]`.
        visible: Contiguous uint8 or integers `[S, groups]`.
        group_spans: Rows are first key, last key + 1, first row, last row + 1 of each group.
        bits: Group g is bit g % 32 of word g // 32.
        row_spans: First and last-plus-one key that each row sees.
    """
    length, groups = visible.shape
    keys, words = key_groups.shape[0], bits.shape[0]
    spans = group_spans.unbind(0)
    return (
        Launch(
            groups_kernel,
            (32 * words,),
            (key_groups, visible, *spans, groups, length, keys),
            {},
            {"MANY": _MANY, **_TILE},
        ),
        Launch(
            words_kernel,
            (ceil_div(length, _ROWS),),
            (visible, *spans[:2], bits, *row_spans.unbind(0), groups, words, length, keys),
            {},
            {"BLOCK_M": _ROWS, **_TILE},
        ),
    )


def int32(like: Tensor, *shape: int) -> Tensor:
    """Allocate memory for one of the results."""
    return like.new_empty(shape, dtype=torch.int32)

"""Shared code of the Triton kernels of attention: the keys that a block of rows sees, and tiles of head lanes.

A head dimension is cut into a main and a tail part (80 = 64 + 16), since a tile's sides are powers of two and lanes of padding
would be multiplied like all others. Every row has a range of keys [start, end). Blocks outside the ranges of all rows are
never visited, and blocks inside the range of every row are not masked. Groups of keys are bits of words: a row has one bit a
group, so a mask is one AND in registers, and 32 groups are one pass over the keys that belong to them.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit  # type: ignore[untyped-decorator]
def load_lanes(pointer, row_at, lane, row_ok, first, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, SAFE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load lanes [first, first + HEAD_DIM) of rows; zero past the head dimension and, unless SAFE, where not ok."""
    lanes = first + tl.arange(0, HEAD_DIM)
    at = pointer + row_at[:, None] + lanes[None, :] * lane
    if first + HEAD_DIM <= DIM:
        if SAFE:
            return tl.load(at)
        return tl.load(at, mask=row_ok[:, None], other=0.0)
    if SAFE:
        return tl.load(at, mask=(lanes < DIM)[None, :], other=0.0)
    return tl.load(at, mask=row_ok[:, None] & (lanes < DIM)[None, :], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def store_lanes(pointer, row_at, row_ok, values, first, DIM: tl.constexpr, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write `[rows, HEAD_DIM]` to lanes [first, first + HEAD_DIM), which are neighbours in memory."""
    lanes = first + tl.arange(0, HEAD_DIM)
    at = pointer + row_at[:, None] + lanes[None, :]
    tl.store(at, values.to(pointer.dtype.element_ty), mask=row_ok[:, None] & (lanes < DIM)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def products(left, left_tail, right, right_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply every row of one tile by every row of another, over both parts of their lanes, in float32."""
    result = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    if TAIL > 0:
        result = tl.dot(left_tail, tl.trans(right_tail), result, input_precision=PRECISION)
    return result


@triton.jit  # type: ignore[untyped-decorator]
def row_bounds(  # type: ignore[no-untyped-def]
    starts, ends, rows, row_ok, length, keys, BLOCK_M: tl.constexpr, RANGED: tl.constexpr, CAUSAL: tl.constexpr
):
    """Return the keys [start, end) that each row of a block may see."""
    if RANGED:
        start = tl.load(starts + rows, mask=row_ok, other=0)
        end = tl.load(ends + rows, mask=row_ok, other=0)
    else:
        start = tl.zeros([BLOCK_M], tl.int32)
        end = tl.zeros([BLOCK_M], tl.int32) + keys
    if CAUSAL:
        end = tl.minimum(end, rows + (keys - length) + 1)
    return start, end


@triton.jit  # type: ignore[untyped-decorator]
def key_bounds(  # type: ignore[no-untyped-def]
    starts, ends, index, col_ok, cols, length, keys, BLOCK_N: tl.constexpr, RANGED: tl.constexpr, CAUSAL: tl.constexpr
):
    """Return the rows [start, end) that may see each key of a block; `index` reads them: of the key, or of its group."""
    if RANGED:
        start = tl.load(starts + index, mask=col_ok, other=0)
        end = tl.load(ends + index, mask=col_ok, other=0)
    else:
        start = tl.zeros([BLOCK_N], tl.int32)
        end = tl.zeros([BLOCK_N], tl.int32) + length
    if CAUSAL:
        start = tl.maximum(start, cols - (keys - length))
    return start, end


@triton.jit  # type: ignore[untyped-decorator]
def span(start, end, ok, MANY: tl.constexpr, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return bounds in blocks of MANY: [low, high) holds the ranges of all that are ok, [whole_low, whole_high) lies in
    each of them.

    Unless WHOLE nothing lies in all of them.
    """
    low = tl.min(tl.where(ok & (start < end), start, 2147483647), 0) // MANY * MANY
    high = tl.max(tl.where(ok, end, 0), 0)
    if WHOLE:
        whole_low = tl.cdiv(tl.max(tl.where(ok, start, 0), 0), MANY) * MANY
        whole_high = tl.min(tl.where(ok, end, 2147483647), 0) // MANY * MANY
        if whole_low >= whole_high:
            whole_low = low
            whole_high = low
    else:
        whole_low = low
        whole_high = low
    return low, high, whole_low, whole_high


@triton.jit  # type: ignore[untyped-decorator]
def edge_blocks(low, high, whole_low, whole_high, MANY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Count the blocks in a span: below its whole part, and in both edges together."""
    below = tl.maximum(whole_low - low, 0) // MANY
    return below, below + tl.maximum(tl.cdiv(high - whole_high, MANY), 0)


@triton.jit
def group_bit(group, word):  # type: ignore[no-untyped-def]
    """Return the bit of each key's group in a word; zero where its group is in another word."""
    return tl.where((group >> 5) == word, 1 << (group & 31), 0)


@triton.jit  # type: ignore[untyped-decorator]
def word_keys(group_starts, group_ends, word, low, high, keys, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the keys [first, last) of a word's groups inside of [low, high), first in blocks of BLOCK_N: one block at
    least."""
    groups = word * 32 + tl.arange(0, 32)
    first = tl.maximum(low, tl.min(tl.load(group_starts + groups), 0))
    first = tl.minimum(first // BLOCK_N * BLOCK_N, keys)
    return first, tl.maximum(tl.minimum(high, tl.max(tl.load(group_ends + groups), 0)), first + 1)


@triton.jit  # type: ignore[untyped-decorator]
def word_span(  # type: ignore[no-untyped-def]
    visible_bits, group_starts, group_ends, words, rows, row_ok, low, high, length, keys, BLOCK_N: tl.constexpr
):
    """Return the first word of groups that a block of rows sees, and the blocks of keys up to the last word."""
    first_word = words
    last_word = -1
    for word in range(words):
        bits = tl.load(visible_bits + word * length + rows, mask=row_ok, other=0)
        if tl.max((bits != 0).to(tl.int32), 0) > 0:
            first_word = tl.minimum(first_word, word)
            last_word = word
    blocks = 0
    for word in range(first_word, last_word + 1):
        first, last = word_keys(group_starts, group_ends, word, low, high, keys, BLOCK_N)
        blocks += tl.cdiv(last - first, BLOCK_N)
    return tl.minimum(first_word, words - 1), blocks


@triton.jit  # type: ignore[untyped-decorator]
def seen_keys(  # type: ignore[no-untyped-def]
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
    MASKED: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Return a mask `[rows, keys]` of the keys of a block that each row sees."""
    if GROUPED:
        bits = tl.load(visible_bits + word * length + rows, mask=row_ok, other=0)
        group = tl.load(key_groups + cols, mask=col_ok, other=-1)
        return (bits[:, None] & group_bit(group, word)[None, :]) != 0
    seen = (cols[None, :] >= start[:, None]) & (cols[None, :] < end[:, None])
    if MASKED:
        seen = seen & (tl.load(key_mask + cols * mask_key, mask=col_ok, other=0) != 0)[None, :]
    return seen


@triton.jit  # type: ignore[untyped-decorator]
def next_block(  # type: ignore[no-untyped-def]
    first_key, last_key, word, group_starts, group_ends, words, low, high, keys, BLOCK_N: tl.constexpr
):
    """Return the next block of keys: of the same word, or the first of the next word."""
    first_key += BLOCK_N
    if first_key >= last_key:
        word = tl.minimum(word + 1, words - 1)
        first_key, last_key = word_keys(group_starts, group_ends, word, low, high, keys, BLOCK_N)
    return first_key, last_key, word

"""Launches attention of one query row on a long cache of keys: in parts, then joined."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmbuild.ops.attention.kernels_decode import decode_kernel, join_kernel
from vlmbuild.ops.tiles import tile_of
from vlmbuild.ops.triton_util import Launch, ceil_div, power_of_two, precision

LEAST_KEYS = 512
"""Fewer keys are passed by one program a head."""

LEAST_PART = 256
"""Keys of a part, at least."""

_PROGRAMS = 264
"""Programs that keep a GPU busy: two for each multiprocessor of an H100."""

_LEAST_ROWS = 16
"""Tensor cores multiply no fewer."""


def decode_parts(key: Tensor) -> int:
    """Return the number of parts that the keys are split into."""
    heads = key.shape[0] * key.shape[1]
    return max(1, min(ceil_div(_PROGRAMS, heads), ceil_div(key.shape[2], LEAST_PART)))


def decode_launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
    lanes: tuple[int, int],
    parts: int,
    target: int,
) -> tuple[Launch, Launch]:
    """Return the launches into `out` `[B, 1, Hq, D]` and `logsumexp` `[B, Hq, 1]`, in order.

    Args:
        query: `[B, Hq, 1, D]`.
        key: `[B, Hkv, T, D]`.
        value: Like `key`.
        key_mask: Bytes or integers `[B, T]`; keys that are zero are not seen.
        out, logsumexp: Written.
        scale: Factor on the scores, with log2(e) in it.
        lanes: The parts of the head dimension.
        parts: Number of parts that the keys are split into.
        target: Compute capability.
    """
    batch, heads, _, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    tile = tile_of("attention_decode", dim, query.dtype, target)
    partial = query.new_empty((parts, batch, heads, dim), dtype=torch.float32)
    shares = query.new_empty((parts, batch, heads), dtype=torch.float32)
    split = ceil_div(ceil_div(keys, parts), tile["BLOCK_N"]) * tile["BLOCK_N"]
    mask = query if key_mask is None else key_mask
    strides = (
        query.stride(0),
        query.stride(1),
        query.stride(3),
        *key.stride(),
        *value.stride(),
        *((0, 0) if key_mask is None else key_mask.stride()),
    )
    constants = {
        "GQA": heads // kv_heads,
        "DIM": dim,
        "HEAD_DIM": lanes[0],
        "TAIL": lanes[1],
        "MASKED": key_mask is not None,
        **precision(query.dtype),
        "BLOCK_M": power_of_two(heads // kv_heads, _LEAST_ROWS),
    }
    arguments = (query, key, value, mask, partial, shares, *strides, kv_heads, keys, split, scale)
    joined = (out, partial, shares, logsumexp, parts, batch * heads)
    return (
        Launch(decode_kernel, (parts, batch * kv_heads), arguments, constants, tile),
        Launch(
            join_kernel,
            (batch * heads,),
            joined,
            {"DIM": dim, "HEAD_DIM": power_of_two(dim)},
            {"num_warps": 1, "num_stages": 1},
        ),
    )

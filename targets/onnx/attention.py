"""Attention in ONNX: within segments, by groups of keys, and with a key-value cache. None of them makes a square
mask."""

from __future__ import annotations

import torch

from vlmbuild.errors import PassError
from vlmbuild.targets.onnx.graph_builder import CONTRIB, GraphBuilder
from vlmbuild.targets.onnx.translate import Site, Value

LEAST = {torch.float32: -1e9, torch.float16: -3e4}
"""Added to scores of keys that are not seen. Finite, so that rows which see nothing (padding) are no NaN."""
ROWS = 512
"""Queries that attend at a time, with masks by groups of keys."""


def attention(
    site: Site,
    query: Value,
    key: Value,
    value: Value,
    key_mask: Value | None,
    cu_seqlens: Value | None,
    key_groups: Value | None,
    visible_groups: Value | None,
    causal: bool,
    scale: float,
    lookahead: Value | None = None,
    window: int | None = None,
) -> str:
    """Translate `vlmbuild::attention`: query [B, Hq, S, D], key and value [B, Hkv, T, D] -> [B, S, Hq, D].

    Measured on a CPU (one thread, float32): segments in a loop of MultiHeadAttention take as long as, and up to 17
    times less than, one call with a mask over all of them; with a cache, Attention takes as long as
    GroupQueryAttention, which refuses some batches.
    """
    builder = site.builder
    if cu_seqlens is not None and not causal and key_mask is None:
        return _by_segments(builder, (query, key, value), cu_seqlens, scale)
    if not causal and all(mask is None for mask in (key_mask, cu_seqlens, key_groups, lookahead, window)):
        return _unmasked(builder, (query, key, value), scale)
    if key_groups is not None and visible_groups is not None:
        return _by_groups(builder, (query.name, key.name, value.name), key_groups.name, visible_groups.name, scale)
    if key_mask is not None and cu_seqlens is None:
        ahead = None if lookahead is None else lookahead.name
        bias = builder.once(
            ("bias", key_mask.name, causal, ahead, window),
            lambda: _bias(builder, query.name, key_mask.name, causal, ahead, window),
        )
        return _attend(builder, query.name, key.name, value.name, bias, scale)
    raise PassError("Attention of this form has no translation to ONNX. This is a limit of vlmbuild; report it.")


def _attend(builder: GraphBuilder, query: str, key: str, value: str, bias: str, scale: float) -> str:
    result = builder.op("Attention", query, key, value, bias, scale=scale)
    return str(builder.op("Transpose", result, perm=[0, 2, 1, 3]))


def _bias(
    builder: GraphBuilder, query: str, key_mask: str, causal: bool, lookahead: str | None, window: int | None
) -> str:
    """Build the additive mask [B, 1, S, T], 0 where a key is seen; layers share it."""
    seen = builder.op("Unsqueeze", builder.cast(key_mask, torch.bool), builder.constant([1, 2]))
    if causal:
        rows, keys = (builder.op("Squeeze", builder.size(x, axis)) for x, axis in ((query, 2), (key_mask, 1)))
        zero, one = builder.constant(0), builder.constant(1)
        column = builder.op("Range", zero, keys, one)
        own = builder.op("Range", builder.op("Sub", keys, rows), keys, one)
        row = builder.op("Unsqueeze", own, builder.constant([1]))
        last = row
        if lookahead is not None:
            reach = builder.op("Add", own, builder.cast(lookahead, torch.int64))
            last = builder.op("Unsqueeze", reach, builder.constant([1, 3]))
        seen = builder.op("And", seen, builder.op("LessOrEqual", column, last))
        if window is not None:
            oldest = builder.op("Sub", row, builder.constant(window - 1))
            seen = builder.op("And", seen, builder.op("GreaterOrEqual", column, oldest))
    return _penalty(builder, seen)


def _penalty(builder: GraphBuilder, seen: str) -> str:
    dtype = builder.compute
    return str(builder.op("Where", seen, builder.constant(0, dtype), builder.constant(LEAST[dtype], dtype)))


def _rows(builder: GraphBuilder, states: tuple[Value, Value, Value], batch: int) -> tuple[list[str], int, int]:
    """Lay out [B, H, N, D] as [B, N, H * D], where `batch` is B or 0 for any; returns H and D too."""
    heads, dim = states[0].static(1), states[0].static(3)
    assert heads is not None
    assert dim is not None
    shape = [batch, -1, heads * dim]
    return [builder.reshape(builder.op("Transpose", x.name, perm=[0, 2, 1, 3]), shape) for x in states], heads, dim


def _unmasked(builder: GraphBuilder, states: tuple[Value, Value, Value], scale: float) -> str:
    """Attend to all keys of the same element of the batch: [B, H, N, D] -> [B, N, H, D]."""
    rows, heads, dim = _rows(builder, states, 0)
    result = builder.op("MultiHeadAttention", *rows, domain=CONTRIB, num_heads=heads, scale=scale)
    return builder.reshape(result, [0, -1, heads, dim])


def _by_segments(builder: GraphBuilder, states: tuple[Value, Value, Value], cu_seqlens: Value, scale: float) -> str:
    """Attend within each segment, in a loop: [1, H, N, D] -> [1, N, H, D]."""
    rows, heads, dim = _rows(builder, states, 1)
    bounds = builder.once(("bounds", cu_seqlens.name), lambda: builder.cast(cu_seqlens.name, torch.int64))
    count = builder.op("Sub", builder.op("Squeeze", builder.size(bounds, 0)), builder.constant(1))

    def segment(body: GraphBuilder, number: str) -> str:
        start = body.op("Gather", bounds, number)
        end = body.op("Gather", bounds, body.op("Add", number, body.constant([1])))
        own = [body.op("Slice", row, start, end, body.constant([1])) for row in rows]
        return str(body.op("MultiHeadAttention", *own, domain=CONTRIB, num_heads=heads, scale=scale))

    return builder.reshape(builder.loop(count, segment, axis=1), [1, -1, heads, dim])


def _by_groups(builder: GraphBuilder, states: tuple[str, str, str], groups: str, visible: str, scale: float) -> str:
    """Attend for some queries at a time, in a loop, to the keys from the first to the last that any of them sees."""
    query, key, value = states
    seen = builder.once(("visible", visible), lambda: _some_visible(builder, visible))
    rows = builder.op("Squeeze", builder.size(query, 2))
    step = builder.constant(ROWS)
    count = builder.op("Div", builder.op("Add", rows, builder.constant(ROWS - 1)), step)

    def part(body: GraphBuilder, number: str) -> str:
        start = body.op("Mul", number, body.constant([ROWS]))
        end = body.op("Add", start, body.constant([ROWS]))
        own = body.op("Slice", query, start, end, body.constant([2]))
        mask = body.op("Slice", seen, start, end, body.constant([0]))
        by_key = body.op("Gather", mask, groups, axis=1)
        positions = body.op(
            "NonZero", body.op("ReduceMax", body.cast(by_key, torch.int32), body.constant([0]), keepdims=0)
        )
        first = body.op("ReduceMin", positions, body.constant([1]), keepdims=0)
        last = body.op("Add", body.op("ReduceMax", positions, body.constant([1]), keepdims=0), body.constant([1]))
        bias = _penalty(body, body.op("Slice", by_key, first, last, body.constant([1])))
        keys, values = (body.op("Slice", x, first, last, body.constant([2])) for x in (key, value))
        return _attend(body, own, keys, values, bias, scale)

    return builder.loop(count, part, axis=1)


def _some_visible(builder: GraphBuilder, visible: str) -> str:
    """Let rows that see no group (padding) see all, so that they give numbers."""
    any_seen = builder.op("ReduceMax", builder.cast(visible, torch.int32), builder.constant([1]), keepdims=1)
    return str(builder.op("Or", visible, builder.op("Not", builder.cast(any_seen, torch.bool))))

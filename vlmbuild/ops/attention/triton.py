"""Launches the Triton kernels of attention, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.ops.attention.kernels_backward import grad_key_kernel, grad_query_kernel
from vlmbuild.ops.attention.kernels_forward import forward_kernel
from vlmbuild.ops.attention.op import Grads, Masks, check_attention, gather_masks, key_intervals, row_ranges
from vlmbuild.ops.tiles import tile_of
from vlmbuild.ops.triton_util import INTERPRET, Launch, ceil_div, power_of_two, precision, require_device, target_of
from vlmbuild.util.dtypes import FLOATS

_LOG2E = math.log2(math.e)
_LEAST_LANES = 16
"""Tensor cores multiply no fewer."""
_WORD = 32
"""Bits of a word of groups."""


class Ranges(NamedTuple):
    """Masks as the kernels read them. Tensors that a kernel is compiled not to read still need a pointer.

    Attributes:
        row_keys: First and last-plus-one key that each row may see, int32.
        key_rows: First and last-plus-one row that may see each key, or each group of keys.
        group_keys: First and last-plus-one key of each group.
        bits: Groups that each row sees, int32 `[words, S]`: group g is bit g % 32 of word g // 32.
        words: Number of words.
    """

    row_keys: tuple[Tensor, Tensor]
    key_rows: tuple[Tensor, Tensor]
    group_keys: tuple[Tensor, Tensor]
    bits: Tensor
    words: int


def mask_ranges(masks: Masks, query: Tensor, keys: int) -> Ranges:
    """Compute the ranges of segments or of groups, which causal order narrows, or the intervals of windows and blocks, which
    know of it already."""
    unread = (query, query)
    if _has_intervals(masks):
        start, end = (bound[0] for bound in key_intervals(masks, True, query.shape[2], keys, query.device))
        every = torch.arange(keys, device=query.device, dtype=torch.int32)
        # Both rise from row to row: a key is seen by the rows between the first that ends and the last that starts.
        first, last = (torch.searchsorted(bound, every, right=True, out_int32=True) for bound in (end, start))
        return Ranges((start, end), (first, last), unread, query, 0)
    if masks.cu_seqlens is not None:
        spans = row_ranges(masks.cu_seqlens, query.shape[2])  # a segment has the same rows and keys
        return Ranges(spans, spans, unread, query, 0)
    if masks.key_groups is None or masks.visible_groups is None:
        return Ranges(unread, unread, unread, query, 0)
    words = max(1, ceil_div(masks.visible_groups.shape[1], _WORD))
    every = torch.arange(words * _WORD, device=query.device)
    seen = F.pad(masks.visible_groups != 0, (0, len(every) - masks.visible_groups.shape[1]))
    group_keys = _spans(masks.key_groups == every.unsqueeze(1))
    first, last = (ends.unsqueeze(0) for ends in group_keys)
    keys = masks.key_groups.shape[0]
    row_keys = torch.where(seen, first, keys).amin(1), torch.where(seen, last, 0).amax(1)
    # Distinct bits: their sum is their union, and the top one wraps to the sign.
    bits = (seen.unflatten(1, (words, _WORD)).int() << every[:_WORD].int()).sum(-1, dtype=torch.int32)
    return Ranges(row_keys, _spans(seen.T), group_keys, bits.T.contiguous(), words)


def _has_intervals(masks: Masks) -> bool:
    return masks.window is not None or masks.lookahead is not None


def _spans(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return first and last-plus-one true column of every row, int32; a first behind the last where there is none."""
    columns = torch.arange(seen.shape[1], device=seen.device, dtype=torch.int32)
    return torch.where(seen, columns, seen.shape[1]).amin(1), torch.where(seen, columns + 1, 0).amax(1)


class _Shared(NamedTuple):
    """Arguments that the kernels share."""

    masks: tuple[Tensor, Tensor, Tensor]
    ranges: Ranges
    strides: tuple[int, ...]
    constants: dict[str, Any]


def split_lanes(dim: int) -> tuple[int, int]:
    """Split a head dimension into powers of two (main, tail) with least padding: 80 is (64, 16), 128 is (128, 0)."""
    whole = power_of_two(dim, _LEAST_LANES)
    main = whole // 2
    if dim == whole or main < _LEAST_LANES:
        return whole, 0
    tail = power_of_two(dim - main, _LEAST_LANES)
    return (main, tail) if tail < main else (whole, 0)


def _shared(query: Tensor, key: Tensor, value: Tensor, masks: Masks, causal: bool) -> _Shared:
    lanes, tail = split_lanes(query.shape[3])
    intervals = _has_intervals(masks)
    constants = {
        "GQA": query.shape[1] // key.shape[1],
        "DIM": query.shape[3],
        "HEAD_DIM": lanes,
        "TAIL": tail,
        "RANGED": masks.cu_seqlens is not None or masks.key_groups is not None or intervals,
        "MASKED": masks.key_mask is not None,
        "GROUPED": masks.key_groups is not None,
        "CAUSAL": causal and not intervals,
        **precision(query.dtype),
    }
    key_mask = query
    mask_strides: tuple[int, ...] = (0, 0)
    if masks.key_mask is not None:
        key_mask, mask_strides = masks.key_mask, masks.key_mask.stride()
        key_mask = key_mask.view(torch.uint8) if key_mask.dtype == torch.bool else key_mask
    groups = query if masks.key_groups is None else masks.key_groups.contiguous()
    ranges = mask_ranges(masks, query, key.shape[2])
    strides = (*(stride for x in (query, key, value) for stride in _strides(x)), *mask_strides, ranges.words)
    return _Shared((key_mask, groups, ranges.bits), ranges, strides, constants)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Return strides, 0 for a batch of one: its stride may need 64 bits, for which a kernel would be compiled again."""
    return (0 if x.shape[0] == 1 else x.stride(0), *x.stride()[1:])


def _check(query: Tensor, scale: float) -> None:
    require_device("attention_triton", query)
    if query.dtype not in FLOATS:
        raise UsageError(f"attention_triton: {query.dtype} is not supported; use a 16- or 32-bit float")
    if INTERPRET and query.dtype == torch.bfloat16:
        raise UsageError("attention_triton: Triton's interpreter cannot multiply bfloat16; use float32 or float16")
    if not scale > 0:
        raise UsageError(f"attention_triton: the scale {scale} is not above zero; use 'sdpa'")


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    out: Tensor,
    logsumexp: Tensor,
    causal: bool,
    scale: float,
    target: int,
) -> Launch:
    """Return the launch into `out` and `logsumexp`, on a GPU of compute capability `target`."""
    batch, heads, length, dim = query.shape
    shared = _shared(query, key, value, masks, causal)
    tile = tile_of("attention_forward", dim, query.dtype, target)
    sizes = (*shared.strides, heads, length, key.shape[2], scale * _LOG2E)
    tensors = (query, key, value, *shared.masks, *shared.ranges.group_keys, *shared.ranges.row_keys, out, logsumexp)
    grid = (ceil_div(length, tile["BLOCK_M"]), batch * heads)
    return Launch(forward_kernel, grid, (*tensors, *sizes), shared.constants, tile)


def backward_launches(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    out: Tensor,
    logsumexp: Tensor,
    delta: Tensor,
    grads: Grads,
    causal: bool,
    scale: float,
    target: int,
) -> tuple[Launch, Launch]:
    """Return the launches into `grads`, in order: the kernel that writes `delta`, and the one that reads it."""
    batch, heads, length, dim = query.shape
    keys = key.shape[2]
    shared = _shared(query, key, value, masks, causal)
    ranges, inputs = shared.ranges, (query, key, value, *shared.masks)
    sizes = (*shared.strides, heads, length, keys, scale * _LOG2E, scale)
    query_tensors = (*inputs, *ranges.group_keys, *ranges.row_keys, out, logsumexp, grad, delta, grads[0])
    key_tensors = (*inputs, *ranges.key_rows, logsumexp, grad, delta, grads[1], grads[2])
    query_tile = tile_of("attention_grad_query", dim, query.dtype, target)
    key_tile = tile_of("attention_grad_key", dim, query.dtype, target)
    query_grid = (ceil_div(length, query_tile["BLOCK_M"]), batch * heads)
    key_grid = (ceil_div(keys, key_tile["BLOCK_N"]), batch * key.shape[1])
    return (
        Launch(grad_query_kernel, query_grid, (*query_tensors, *sizes), shared.constants, query_tile),
        Launch(grad_key_kernel, key_grid, (*key_tensors, *sizes), shared.constants, key_tile),
    )


def attention_forward_triton(
    query: Tensor, key: Tensor, value: Tensor, masks: Masks, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute `vlmbuild.ops.attention.op.attention_reference`, and the log-sum-exp of every row to base two, `[B, Hq, S]`.

    Raises:
        UsageError: Shapes do not fit, the dtype is not a 16- or 32-bit float, or the scale is not positive.
        DeviceError: The tensors are not where Triton runs.
    """
    check_attention(query, key, value, masks, causal)
    _check(query, scale)
    batch, heads, length, dim = query.shape
    out = query.new_empty((batch, length, heads, dim))
    logsumexp = query.new_empty((batch, heads, length), dtype=torch.float32)
    if out.numel() == 0 or key.numel() == 0:
        return out.zero_(), logsumexp.fill_(math.inf)
    for own, b in _samples(masks.reduced(length, key.shape[2])):
        arguments = (query[b], key[b], value[b], own, out[b], logsumexp[b], causal, scale)
        forward_launch(*arguments, target_of(query)).run()
    return out, logsumexp


def _samples(masks: Masks) -> Iterator[tuple[Masks, slice]]:
    """Yield masks and samples of each launch: all, or one after the other where they have blocks of their own."""
    if masks.lookahead is None or len(masks.lookahead) == 1:
        yield masks, slice(None)
        return
    for number in range(len(masks.lookahead)):
        one = slice(number, number + 1)
        key_mask = None if masks.key_mask is None else masks.key_mask[one]
        yield masks._replace(key_mask=key_mask, lookahead=masks.lookahead[one]), one


def attention_backward_triton(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    out: Tensor,
    logsumexp: Tensor,
    causal: bool,
    scale: float,
) -> Grads:
    """Compute gradients for query, key and value, contiguous, from the results of `attention_forward_triton`.

    Raises:
        UsageError, DeviceError: See `attention_forward_triton`.
    """
    _check(query, scale)
    grads = (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))
    if grads[0].numel() == 0 or grads[1].numel() == 0:
        return grads[0].zero_(), grads[1].zero_(), grads[2].zero_()
    grad, out = grad.contiguous(), out.contiguous()
    delta = torch.empty_like(logsumexp)
    for own, b in _samples(masks.reduced(query.shape[2], key.shape[2])):
        tensors = (grad[b], query[b], key[b], value[b], own, out[b], logsumexp[b], delta[b])
        parts = (grads[0][b], grads[1][b], grads[2][b])
        for launch in backward_launches(*tensors, parts, causal, scale, target_of(query)):
            launch.run()
    return grads


def launches(arguments: tuple[Any, ...], target: int, backward: bool) -> tuple[Launch, ...]:
    """Return the launches of a call of the operator; see `vlmbuild.ops.operator.Operator.launches`."""
    query, key, value, masks, causal, scale = gather_masks(arguments)
    batch, heads, length, dim = query.shape
    out = query.new_empty((batch, length, heads, dim))
    sums = query.new_empty((batch, heads, length), dtype=torch.float32)
    forward = forward_launch(query, key, value, masks, out, sums, causal, scale, target)
    if not backward:
        return (forward,)
    grads = (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))
    return forward, *backward_launches(out, query, key, value, masks, out, sums, sums, grads, causal, scale, target)

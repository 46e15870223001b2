"""Launches the Triton kernels of attention, forward and backward."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.ops.attention.kernels_backward import grad_key_kernel, grad_query_kernel
from vlmbuild.ops.attention.kernels_forward import forward_kernel
from vlmbuild.ops.attention.op import Masks, check_attention
from vlmbuild.ops.attention.triton_decode import LEAST_KEYS, decode_launches, decode_parts
from vlmbuild.ops.attention.triton_ranges import groups_launches, int32, segments_launch
from vlmbuild.ops.tiles import tile_of
from vlmbuild.ops.triton_util import INTERPRET, Launch, ceil_div, power_of_two, precision, require_device, target_of
from vlmbuild.util.dtypes import FLOATS

_LOG2E = math.log2(math.e)
_LEAST_LANES = 16
"""Tensor cores multiply no fewer."""


class _Shared(NamedTuple):
    """Arguments that the kernels share; `row_ranges` are keys that a row may see, `key_ranges` rows that may see a key
    or its group, `group_keys` keys of groups; `launches` write them. Tensors that a kernel is compiled not to read
    still need a pointer."""

    row_ranges: tuple[Tensor, Tensor]
    key_ranges: tuple[Tensor, Tensor]
    masks: tuple[Tensor, Tensor, Tensor]
    group_keys: tuple[Tensor, Tensor]
    strides: tuple[int, ...]
    constants: dict[str, Any]
    launches: tuple[Launch, ...]


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
    constants = {
        "GQA": query.shape[1] // key.shape[1],
        "DIM": query.shape[3],
        "HEAD_DIM": lanes,
        "TAIL": tail,
        "RANGED": masks.cu_seqlens is not None or masks.key_groups is not None,
        "MASKED": masks.key_mask is not None,
        "GROUPED": masks.key_groups is not None,
        "CAUSAL": causal,
        **precision(query.dtype),
    }
    key_mask = query
    mask_strides: tuple[int, ...] = (0, 0)
    if masks.key_mask is not None:
        key_mask, mask_strides = _bytes(masks.key_mask), masks.key_mask.stride()
    ranges = _ranges(masks, query)
    strides = (*(stride for x in (query, key, value) for stride in _strides(x)), *mask_strides, ranges.words)
    tensors = (key_mask, ranges.groups, ranges.bits)
    return _Shared(ranges.of_rows, ranges.of_keys, tensors, ranges.of_groups, strides, constants, ranges.launches)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Return strides, 0 for a batch of one: its stride may need 64 bits, for which a kernel would be compiled again."""
    return (0 if x.shape[0] == 1 else x.stride(0), *x.stride()[1:])


class _Ranges(NamedTuple):
    """Which keys rows see, and the launches that write it."""

    of_rows: tuple[Tensor, Tensor]
    of_keys: tuple[Tensor, Tensor]
    of_groups: tuple[Tensor, Tensor]
    groups: Tensor
    bits: Tensor
    words: int = 0
    launches: tuple[Launch, ...] = ()


def _ranges(masks: Masks, query: Tensor) -> _Ranges:
    unread, length = (query, query), query.shape[2]
    if masks.cu_seqlens is not None:
        spans = (int32(query, length), int32(query, length))
        # A segment has the same rows and keys.
        launch = segments_launch(masks.cu_seqlens.contiguous(), *spans)
        return _Ranges(spans, spans, unread, query, query, launches=(launch,))
    if masks.key_groups is None or masks.visible_groups is None:
        return _Ranges(unread, unread, unread, query, query)
    groups, visible = masks.key_groups.contiguous(), _bytes(masks.visible_groups.contiguous())
    words = max(1, ceil_div(visible.shape[1], 32))
    of_groups, bits = int32(query, 4, 32 * words), int32(query, words, length)
    # Both rows aligned whatever the length, or kernels would be compiled again for aligned ones.
    of_rows = int32(query, 2, ceil_div(length, 4) * 4)[:, :length]
    launches = groups_launches(groups, visible, of_groups, bits, of_rows)
    first_key, last_key, first_row, last_row = of_groups.unbind(0)
    starts, ends = of_rows.unbind(0)
    return _Ranges((starts, ends), (first_row, last_row), (first_key, last_key), groups, bits, words, launches)


def _bytes(mask: Tensor) -> Tensor:
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _check(query: Tensor, scale: float) -> None:
    require_device("attention_triton", query)
    if query.dtype not in FLOATS:
        raise UsageError(f"attention_triton: {query.dtype} is not supported; use a 16- or 32-bit float")
    if INTERPRET and query.dtype == torch.bfloat16:
        raise UsageError("attention_triton: Triton's interpreter cannot multiply bfloat16; use float32 or float16")
    if not scale > 0:
        raise UsageError(f"attention_triton: the scale {scale} is not above zero; use 'sdpa'")


def forward_launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    out: Tensor,
    logsumexp: Tensor,
    causal: bool,
    scale: float,
    target: int,
) -> tuple[Launch, ...]:
    """Return the launches into `out` and `logsumexp`, on a GPU of compute capability `target`.

    They compute the masks' ranges, then attention; one row with many keys takes `one_row_launches`.
    """
    batch, heads, length, dim = query.shape
    if length == 1 and masks.cu_seqlens is None and masks.key_groups is None and key.shape[2] >= LEAST_KEYS:
        return one_row_launches(query, key, value, masks.key_mask, out, logsumexp, scale, target)
    shared = _shared(query, key, value, masks, causal)
    tile = tile_of("attention_forward", dim, query.dtype, target)
    sizes = (*shared.strides, heads, length, key.shape[2], scale * _LOG2E)
    tensors = (query, key, value, *shared.masks, *shared.group_keys, *shared.row_ranges, out, logsumexp)
    grid = (ceil_div(length, tile["BLOCK_M"]), batch * heads)
    return (*shared.launches, Launch(forward_kernel, grid, (*tensors, *sizes), shared.constants, tile))


def one_row_launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
    target: int,
) -> tuple[Launch, ...]:
    """Return the launches for a single query row, which is the last one: causal order hides no key from it."""
    mask = None if key_mask is None else _bytes(key_mask)
    lanes, parts = split_lanes(query.shape[3]), decode_parts(key)
    return decode_launches(query, key, value, mask, out, logsumexp, scale * _LOG2E, lanes, parts, target)


def backward_launches(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    out: Tensor,
    logsumexp: Tensor,
    delta: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    causal: bool,
    scale: float,
    target: int,
) -> tuple[Launch, ...]:
    """Return the launches into `grads`, in order: the masks' ranges, the kernel that writes `delta`, the one that reads it."""
    batch, heads, length, dim = query.shape
    keys = key.shape[2]
    shared = _shared(query, key, value, masks, causal)
    inputs = (query, key, value, *shared.masks)
    sizes = (*shared.strides, heads, length, keys, scale * _LOG2E, scale)
    query_tensors = (*inputs, *shared.group_keys, *shared.row_ranges, out, logsumexp, grad, delta, grads[0])
    key_tensors = (*inputs, *shared.key_ranges, logsumexp, grad, delta, grads[1], grads[2])
    query_tile = tile_of("attention_grad_query", dim, query.dtype, target)
    key_tile = tile_of("attention_grad_key", dim, query.dtype, target)
    query_grid = (ceil_div(length, query_tile["BLOCK_M"]), batch * heads)
    key_grid = (ceil_div(keys, key_tile["BLOCK_N"]), batch * key.shape[1])
    return (
        *shared.launches,
        Launch(grad_query_kernel, query_grid, (*query_tensors, *sizes), shared.constants, query_tile),
        Launch(grad_key_kernel, key_grid, (*key_tensors, *sizes), shared.constants, key_tile),
    )


def attention_forward_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_groups: Tensor | None,
    visible_groups: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute `vlmbuild.ops.attention.op.attention_reference`, and the log-sum-exp of every row to base two, `[B, Hq, S]`.

    Raises:
        UsageError: Shapes do not fit, the dtype is not a 16- or 32-bit float, or the scale is not positive.
        DeviceError: The tensors are not where Triton runs.
    """
    masks = Masks(key_mask, cu_seqlens, key_groups, visible_groups)
    check_attention(query, key, value, masks, causal)
    _check(query, scale)
    batch, heads, length, dim = query.shape
    out = query.new_empty((batch, length, heads, dim))
    logsumexp = query.new_empty((batch, heads, length), dtype=torch.float32)
    if out.numel() == 0:
        return out, logsumexp
    for launch in forward_launches(query, key, value, masks, out, logsumexp, causal, scale, target_of(query)):
        launch.run()
    return out, logsumexp


def attention_backward_triton(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_groups: Tensor | None,
    visible_groups: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
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
    masks = Masks(key_mask, cu_seqlens, key_groups, visible_groups)
    target = target_of(query)
    for launch in backward_launches(
        grad, query, key, value, masks, out, logsumexp, delta, grads, causal, scale, target
    ):
        launch.run()
    return grads


def launches(arguments: tuple[Any, ...], target: int, backward: bool) -> tuple[Launch, ...]:
    """Return the launches of a call of the operator; see `vlmbuild.ops.operator.Operator.launches`."""
    query, key, value, *mask_tensors, causal, scale = arguments
    masks, (batch, heads, length, dim) = Masks(*mask_tensors), query.shape
    out = query.new_empty((batch, length, heads, dim))
    sums = query.new_empty((batch, heads, length), dtype=torch.float32)
    forward = forward_launches(query, key, value, masks, out, sums, causal, scale, target)
    if not backward:
        return forward
    grads = (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))
    return (
        *forward,
        *backward_launches(out, query, key, value, masks, out, sums, sums, grads, causal, scale, target),
    )

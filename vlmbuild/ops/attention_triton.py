"""Launches the Triton kernels of attention, forward and backward."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.ops._triton import INTERPRET, Launch, power_of_two, require_device
from vlmbuild.ops.attention import Masks, check_attention, group_ranges, row_ranges
from vlmbuild.ops.attention_kernels import forward_kernel, grad_key_kernel, grad_query_kernel

_LOG2E = math.log2(math.e)


class _Shared(NamedTuple):
    """What the three kernels share; `row_ranges` are keys that a row may see, `key_ranges` rows that may see a key."""

    row_ranges: tuple[Tensor, Tensor]
    key_ranges: tuple[Tensor, Tensor]
    masks: tuple[Tensor, Tensor, Tensor]
    strides: tuple[int, ...]
    constants: dict[str, Any]


def _shared(query: Tensor, key: Tensor, value: Tensor, masks: Masks, causal: bool, backward: bool) -> _Shared:
    dim = query.shape[3]
    full = query.dtype == torch.float32
    tile = 16 if INTERPRET else 32 if full or (backward and dim > 64) else 64
    constants = {
        "GQA": query.shape[1] // key.shape[1],
        "DIM": dim,
        "LANES": power_of_two(dim, 16),
        "ROWS": tile if backward or INTERPRET else 2 * tile,
        "KEYS": tile,
        "RANGED": masks.cu_seqlens is not None or masks.key_groups is not None,
        "MASKED": masks.key_mask is not None,
        "GROUPED": masks.key_groups is not None,
        "CAUSAL": causal,
        # Tensor cores round float32 to ten bits of mantissa unless told not to.
        "PRECISION": "ieee" if full else "tf32",
        "num_warps": 4 if dim <= 64 or backward else 8,
        "num_stages": 2,
    }
    # Tensors that a kernel is compiled not to read still need a pointer.
    row_spans, key_spans = _ranges(masks, query)
    key_mask = query
    mask_strides: tuple[int, ...] = (0, 0)
    if masks.key_mask is not None:
        key_mask, mask_strides = _bytes(masks.key_mask), masks.key_mask.stride()
    groups, visible, many = query, query, 0
    if masks.key_groups is not None and masks.visible_groups is not None:
        groups, visible = masks.key_groups.contiguous(), _bytes(masks.visible_groups.contiguous())
        many = visible.shape[1]
    strides = (*query.stride(), *key.stride(), *value.stride(), *mask_strides, many)
    return _Shared(row_spans, key_spans, (key_mask, groups, visible), strides, constants)


def _ranges(masks: Masks, unread: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if masks.cu_seqlens is not None:
        spans = row_ranges(masks.cu_seqlens, unread.shape[2])
        return spans, spans  # a segment has the same rows and keys
    if masks.key_groups is not None and masks.visible_groups is not None:
        return group_ranges(masks.key_groups, masks.visible_groups)
    return (unread, unread), (unread, unread)


def _bytes(mask: Tensor) -> Tensor:
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _check(query: Tensor) -> None:
    require_device("attention_triton", query)
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"attention_triton: {query.dtype} is not supported; use a 16- or 32-bit float")
    if INTERPRET and query.dtype == torch.bfloat16:
        raise UsageError("attention_triton: Triton's interpreter cannot multiply bfloat16; use float32 or float16")


def forward_launch(
    query: Tensor, key: Tensor, value: Tensor, masks: Masks, out: Tensor, logsumexp: Tensor, causal: bool, scale: float
) -> Launch:
    """The launch of the forward kernel into `out` and `logsumexp`."""
    batch, heads, length, _ = query.shape
    shared = _shared(query, key, value, masks, causal, backward=False)
    sizes = (*shared.strides, heads, length, key.shape[2], scale * _LOG2E)
    tensors = (query, key, value, *shared.masks, *shared.row_ranges, out, logsumexp)
    grid = (triton.cdiv(length, shared.constants["ROWS"]), batch * heads)
    return Launch(forward_kernel, grid, (*tensors, *sizes), shared.constants)


def backward_launches(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, masks: Masks, out: Tensor, logsumexp: Tensor, delta: Tensor,
    grads: tuple[Tensor, Tensor, Tensor], causal: bool, scale: float,
) -> tuple[Launch, Launch]:  # fmt: skip
    """The launches of the backward kernels into `grads`, in order: the first writes `delta`, the second reads it."""
    batch, heads, length, _ = query.shape
    keys = key.shape[2]
    shared = _shared(query, key, value, masks, causal, backward=True)
    constants = shared.constants
    inputs = (query, key, value, *shared.masks)
    sizes = (*shared.strides, heads, length, keys, scale * _LOG2E, scale)
    query_tensors = (*inputs, *shared.row_ranges, out, logsumexp, grad, delta, grads[0])
    key_tensors = (*inputs, *shared.key_ranges, logsumexp, grad, delta, grads[1], grads[2])
    query_grid = (triton.cdiv(length, constants["ROWS"]), batch * heads)
    key_grid = (triton.cdiv(keys, constants["KEYS"]), batch * key.shape[1])
    return (
        Launch(grad_query_kernel, query_grid, (*query_tensors, *sizes), constants),
        Launch(grad_key_kernel, key_grid, (*key_tensors, *sizes), constants),
    )


def attention_forward_triton(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None,
    key_groups: Tensor | None, visible_groups: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`vlmbuild.ops.attention.attention_reference`, and the log-sum-exp of every row to base two, `[B, Hq, S]`.

    Raises:
        UsageError: shapes do not fit, or the dtype is not a 16- or 32-bit float.
        DeviceError: the tensors are not where Triton runs.
    """
    masks = Masks(key_mask, cu_seqlens, key_groups, visible_groups)
    check_attention(query, key, value, masks, causal)
    _check(query)
    batch, heads, length, dim = query.shape
    out = query.new_empty((batch, length, heads, dim))
    logsumexp = query.new_empty((batch, heads, length), dtype=torch.float32)
    if out.numel() == 0:
        return out, logsumexp
    forward_launch(query, key, value, masks, out, logsumexp, causal, scale).run()
    return out, logsumexp


def attention_backward_triton(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None,
    key_groups: Tensor | None, visible_groups: Tensor | None, out: Tensor, logsumexp: Tensor, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients for query, key and value, contiguous, from what `attention_forward_triton` returned.

    Raises:
        UsageError, DeviceError: as there.
    """
    _check(query)
    grads = (query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape))
    if grads[0].numel() == 0 or grads[1].numel() == 0:
        return grads[0].zero_(), grads[1].zero_(), grads[2].zero_()
    grad = grad.contiguous()
    delta = torch.empty_like(logsumexp)
    masks = Masks(key_mask, cu_seqlens, key_groups, visible_groups)
    for launch in backward_launches(grad, query, key, value, masks, out, logsumexp, delta, grads, causal, scale):
        launch.run()
    return grads

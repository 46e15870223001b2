"""Attention within packed segments by torch's variable-length kernel (`torch.nn.attention.varlen`), on a GPU.

The backward runs the forward again through torch's own gradient, as the one of `vlmbuild.ops.attention.sdpa` does on a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from vlmbuild.ops.attention.op import Grads, Masks, check_attention
from vlmbuild.ops.attention.sdpa import logsumexp_like, runs

_MOST_LANES = 256
_LANE_MULTIPLE = 8
_LEAST_CAPABILITY = (8, 0)


def takes(query: Tensor, masks: Masks) -> bool:
    """Return whether torch's kernel takes a call: segments alone or with a window, 16-bit floats, and a head dimension
    that it has."""
    dim = query.shape[3]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and masks.cu_seqlens is not None
        and masks.key_mask is None
        and masks.key_groups is None
        and masks.lookahead is None
        and dim <= _MOST_LANES
        and dim % _LANE_MULTIPLE == 0
        and query.numel() > 0
        and importlib.util.find_spec("torch.nn.attention.varlen") is not None
        and torch.cuda.get_device_capability(query.device) >= _LEAST_CAPABILITY
    )


def varlen_forward(
    query: Tensor, key: Tensor, value: Tensor, masks: Masks, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute `attention_reference` for a call that `takes` accepts, and zeros for the log-sum-exp."""
    check_attention(query, key, value, masks, causal)
    out = query.new_zeros((1, query.shape[2], query.shape[1], query.shape[3]))
    bounds, longest, last = _segments(masks, query.shape[2])
    if longest:
        rows = [_rows(x, last) for x in (query, key, value)]
        out[0, :last] = _attend(rows, bounds, longest, _window(masks, causal), scale)
    return out, logsumexp_like(query)


def varlen_backward(
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
    """Compute the gradients for query, key and value, contiguous."""
    grads = (query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape))
    bounds, longest, last = _segments(masks, query.shape[2])
    if longest:
        with torch.enable_grad():
            leaves = [_rows(x, last).detach().requires_grad_() for x in (query, key, value)]
            again = _attend(leaves, bounds, longest, _window(masks, causal), scale)
        for whole, part in zip(grads, torch.autograd.grad(again, leaves, grad[0, :last].contiguous()), strict=True):
            whole[0, :, :last] = part.transpose(0, 1)
    return grads


def _segments(masks: Masks, rows: int) -> tuple[Tensor, int, int]:
    """Return int32 bounds, the length of the longest segment, and the end of the last one."""
    cu_seqlens = masks.cu_seqlens
    assert cu_seqlens is not None  # `takes` saw to it
    found = runs(cu_seqlens, rows)
    last = found[-1].start + found[-1].length * found[-1].many if found else 0
    return cu_seqlens.to(torch.int32), max((run.length for run in found), default=0), last


def _rows(x: Tensor, last: int) -> Tensor:
    """Return `[1, H, S, D]` as `[last, H, D]` with neighbouring lanes."""
    rows = x[0].transpose(0, 1)[:last]
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _window(masks: Masks, causal: bool) -> tuple[int, int]:
    """Return the numbers of keys before and after its own that a query sees, as torch takes them: -1 is all."""
    return -1 if masks.window is None else masks.window - 1, 0 if causal else -1


def _attend(rows: Sequence[Tensor], bounds: Tensor, longest: int, window: tuple[int, int], scale: float) -> Tensor:
    """Attend with `rows` = query, key and value, each `[tokens, heads, head dim]`."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = rows
    out = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)  # a pair only with its log-sum-exp
    return out

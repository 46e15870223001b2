"""Attention as one operator: masks are one interval of keys per query, or groups of keys; grouped queries, and no S x T mask.

`vlmbuild::attention` defines the meaning, and its eager form is the dense reference. `attention_sdpa`,
`attention_triton` and `attention_auto` have the same signature and meaning, and the pass `swap_attention` puts one of them in
its place. Each is a thin composite over a forward that also returns the log-sum-exp of every row, for the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmbuild.errors import UsageError

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? cu_seqlens, Tensor? key_groups, "
    "Tensor? visible_groups"
)
_OPTIONS = "bool causal, float scale, Tensor? lookahead=None, int? window=None"
"""New masks come last, with defaults: graphs omit arguments equal to these, so artifacts from before them keep their ids."""
SCHEMA = f"({_INPUTS}, {_OPTIONS}) -> Tensor"
FORWARD_SCHEMA = f"({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor logsumexp)"
BACKWARD_SCHEMA = (
    f"(Tensor grad, {_INPUTS}, Tensor out, Tensor logsumexp, {_OPTIONS}) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)


Grads = tuple[Tensor, Tensor, Tensor]
"""Gradients of query, key and value."""


class Masks(NamedTuple):
    """Which keys a query may see, besides causal order.

    Without groups this is one interval of keys, which `key_intervals` computes, and in it the keys of `key_mask`.

    Attributes:
        key_mask: `[B, T]`, bool or integer; keys that are zero are seen by nobody.
        cu_seqlens: Integers `[segments + 1]`, rising from 0; a query sees its own segment only. Repeated values are
            empty segments, rows past the last value see nothing. Needs B == 1 and S == T.
        key_groups: Integers `[T]`, the group of every key. Needs B == 1, and is all that masks: no other mask, not causal.
        visible_groups: Bool or integer `[S, groups]`: a query sees the keys of the groups that are not zero in its row.
        lookahead: Integers `[B, S]`, at least 0: how many keys after its own a query sees, in spite of causal order, which it
            needs. From a row to the next it falls by one at most: so tokens of a block see each other both ways.
        window: Number of keys that a query sees before its own and including it; None is no limit. Needs causal order.
    """

    key_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    key_groups: Tensor | None = None
    visible_groups: Tensor | None = None
    lookahead: Tensor | None = None
    window: int | None = None

    def reduced(self, length: int, keys: int) -> Masks:
        """Drop what masks nothing: lookahead of a single query, which is the last, and a window that holds all keys."""
        return self._replace(
            lookahead=None if length == 1 else self.lookahead,
            window=None if self.window is None or self.window >= keys else self.window,
        )


_MASK_TENSORS = 4
"""Masks that an operator takes after query, key and value; the others follow its last required argument."""


def flat(function: Callable[..., Any], tensors: int = 3, results: int = 0) -> Callable[..., Any]:
    """Make a function that takes `Masks` take its fields one by one, as operators do.

    Args:
        function: Takes tensors, masks, results of the forward, causal and scale.
        tensors: Number of arguments before the masks.
        results: Number of results of the forward.
    """

    @wraps(function)
    def with_masks(*arguments: Any) -> Any:
        return function(*gather_masks(arguments, tensors, results))

    return with_masks


def gather_masks(arguments: Sequence[Any], tensors: int = 3, results: int = 0) -> tuple[Any, ...]:
    """Return an operator's arguments with `Masks` in the place of its fields; options as for `flat`."""
    options = tensors + _MASK_TENSORS
    end = options + results + 2
    masks = Masks(*arguments[tensors:options], *arguments[end:])
    return (*arguments[:tensors], masks, *arguments[options:end])


def check_attention(query: Tensor, key: Tensor, value: Tensor, masks: Masks, causal: bool) -> None:
    """Raise UsageError unless the shapes fit `vlmbuild::attention`."""
    problem = (
        _shape_problem(query, key, value)
        or _mask_problem(query, key, masks)
        or _group_problem(key, masks, causal)
        or _order_problem(query, masks, causal)
    )
    if problem:
        raise UsageError(
            f"attention: {problem}; query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )


def _shape_problem(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        return "query is [B, Hq, S, D], key and value are [B, Hkv, T, D]"
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        return "batch and head dimension of query and key differ"
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        return "the query heads are not a multiple of the key heads"
    return None


def _mask_problem(query: Tensor, key: Tensor, masks: Masks) -> str | None:
    key_mask, cu_seqlens = masks.key_mask, masks.cu_seqlens
    batch, _, length, _ = query.shape
    if key_mask is not None and (key_mask.shape != (batch, key.shape[2]) or key_mask.is_floating_point()):
        return f"key_mask is bool or integer [B, T], not {key_mask.dtype} {tuple(key_mask.shape)}"
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or batch != 1 or length != key.shape[2]):
        return "cu_seqlens is [segments + 1] and needs B == 1 and S == T"
    visible = masks.visible_groups
    if visible is not None and (batch != 1 or visible.dim() != 2 or visible.shape[0] != length):
        return f"visible_groups is [S, groups] and needs B == 1, not {tuple(visible.shape)}"
    return None


def _group_problem(key: Tensor, masks: Masks, causal: bool) -> str | None:
    groups, visible = masks.key_groups, masks.visible_groups
    if (groups is None) != (visible is None):
        return "key_groups and visible_groups belong together"
    if groups is None:
        return None
    if groups.shape != (key.shape[2],) or groups.is_floating_point():
        return f"key_groups is integer [T], not {groups.dtype} {tuple(groups.shape)}"
    if causal or masks.key_mask is not None or masks.cu_seqlens is not None:
        return "groups of keys say all that a query sees: pass neither key_mask, cu_seqlens nor causal with them"
    return None


def _order_problem(query: Tensor, masks: Masks, causal: bool) -> str | None:
    lookahead, window = masks.lookahead, masks.window
    if (window is not None or lookahead is not None) and not causal:
        return "window and lookahead need causal order"
    if window is not None and window < 1:
        return f"a window of {window} keys shows nothing; it needs at least 1"
    rows = (query.shape[0], query.shape[2])
    if lookahead is not None and (lookahead.shape != rows or lookahead.is_floating_point()):
        return f"lookahead is integer [B, S], not {lookahead.dtype} {tuple(lookahead.shape)}"
    return None


def row_ranges(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return first and last-plus-one key of every row, from segment bounds: int32 `[S]`, both the end for rows past it."""
    bounds = cu_seqlens.to(torch.int64)
    rows = torch.arange(length, device=cu_seqlens.device)
    after = torch.searchsorted(bounds, rows, right=True)
    inside = (after > 0) & (after < bounds.shape[0])
    end = bounds[after.clamp(max=bounds.shape[0] - 1)]
    start = torch.where(inside, bounds[(after - 1).clamp(min=0)], end)
    return start.to(torch.int32), end.to(torch.int32)


def key_intervals(masks: Masks, causal: bool, length: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return first and last-plus-one key that each query may see: int32 `[1 or B, S]`, both rising from row to row.

    A row that sees no key has an end that is no greater than its start. Padding and groups are masked besides.
    """
    own = torch.arange(length, device=device) + (keys - length)
    start, end = torch.zeros_like(own)[None], torch.full_like(own, keys)[None]
    if masks.cu_seqlens is not None:
        start, end = (bound[None] for bound in row_ranges(masks.cu_seqlens, length))
    if causal:
        last = own[None] if masks.lookahead is None else own + masks.lookahead
        end = torch.minimum(end, last + 1)
    if masks.window is not None:
        start = torch.maximum(start, own + (1 - masks.window))
    return start.to(torch.int32), end.to(torch.int32)


def allowed_keys(length: int, keys: int, masks: Masks, causal: bool, device: torch.device) -> Tensor:
    """Return a boolean mask that broadcasts to `[B, 1, S, T]`: the dense form of the operator's masks."""
    j = torch.arange(keys, device=device).unsqueeze(0)
    allowed = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
    if masks.cu_seqlens is not None or masks.lookahead is not None or masks.window is not None:
        start, end = (bound[:, None, :, None] for bound in key_intervals(masks, causal, length, keys, device))
        allowed = allowed & (j >= start) & (j < end)
    elif causal:
        allowed = allowed & (j <= torch.arange(length, device=device).unsqueeze(1) + (keys - length))
    if masks.key_mask is not None:
        allowed = allowed & (masks.key_mask != 0)[:, None, None, :]
    if masks.key_groups is not None and masks.visible_groups is not None:
        allowed = allowed & (masks.visible_groups != 0)[:, masks.key_groups.to(torch.int64)]
    return allowed


def _probabilities(query: Tensor, key: Tensor, masks: Masks, causal: bool, scale: float) -> Tensor:
    """Compute softmax over allowed keys, `[B, Hq, S, T]` in at least float32; key already has the query's heads."""
    scores = (query @ key.transpose(-1, -2)) * scale
    allowed = allowed_keys(query.shape[2], key.shape[2], masks, causal, query.device)
    scores = scores.masked_fill(~allowed, float("-inf"))
    # A row without keys is NaN after softmax; all of it is masked, so this makes it zero.
    return scores.softmax(dim=-1).masked_fill(~allowed, 0.0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def attention_reference(query: Tensor, key: Tensor, value: Tensor, masks: Masks, causal: bool, scale: float) -> Tensor:
    """Compute softmax attention in float32 with a dense mask: the meaning of the operator.

    Args:
        query: `[B, Hq, S, D]`.
        key: `[B, Hkv, T, D]` where Hkv divides Hq.
        value: Like `key`.
        masks: Keys that a query may see.
        causal: Key j is seen by query i only where `j <= i + T - S`.
        scale: Factor on the scores.

    Returns:
        `[B, S, Hq, D]`, contiguous, in the query's dtype. Rows that see no key are zero.

    Raises:
        UsageError: Shapes do not fit.
    """
    check_attention(query, key, value, masks, causal)
    groups = query.shape[1] // key.shape[1]
    wide_key = _wide(key).repeat_interleave(groups, dim=1)
    wide_value = _wide(value).repeat_interleave(groups, dim=1)
    probabilities = _probabilities(_wide(query), wide_key, masks, causal, scale)
    return (probabilities @ wide_value).transpose(1, 2).to(query.dtype).contiguous()


def attention_reference_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, masks: Masks, causal: bool, scale: float
) -> Grads:
    """Compute gradients for query, key and value, contiguous, from the inputs alone: the probabilities are computed again."""
    batch, heads, _, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    wide_query, wide_grad = _wide(query), _wide(grad).transpose(1, 2)
    wide_key = _wide(key).repeat_interleave(groups, dim=1)
    wide_value = _wide(value).repeat_interleave(groups, dim=1)
    p = _probabilities(wide_query, wide_key, masks, causal, scale)
    grad_p = wide_grad @ wide_value.transpose(-1, -2)
    grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True))
    per_group = (batch, kv_heads, groups, keys, dim)
    grad_query = (grad_scores @ wide_key) * scale
    grad_key = (grad_scores.transpose(-1, -2) @ wide_query).view(per_group).sum(2) * scale
    grad_value = (p.transpose(-1, -2) @ wide_grad).view(per_group).sum(2)
    return (
        grad_query.to(query.dtype).contiguous(),
        grad_key.to(key.dtype).contiguous(),
        grad_value.to(value.dtype).contiguous(),
    )


def fake_output(query: Tensor, key: Tensor, value: Tensor, masks: Masks, causal: bool, scale: float) -> Tensor:
    """Allocate the result after checking the arguments."""
    check_attention(query, key, value, masks, causal)
    batch, heads, length, dim = query.shape
    return query.new_empty((batch, length, heads, dim))


def fake_grads(_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Grads:
    """Allocate the gradients."""
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


attention = torch.library.custom_op("vlmbuild::attention", flat(attention_reference), mutates_args=(), schema=SCHEMA)
attention_backward = torch.library.custom_op(
    "vlmbuild::attention_backward",
    flat(attention_reference_backward, 4),
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, {_OPTIONS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
)
attention.register_fake(flat(fake_output))
attention_backward.register_fake(fake_grads)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.causal, ctx.scale, lookahead, ctx.window = inputs
    ctx.save_for_backward(*tensors, lookahead)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    backward = torch.ops.vlmbuild.attention_backward.default
    *tensors, lookahead = ctx.saved_tensors
    return *backward(grad, *tensors, ctx.causal, ctx.scale, lookahead, ctx.window), *NO_GRADS


NO_GRADS = (None,) * (_MASK_TENSORS + 4)
"""Gradients of the operators' arguments after query, key and value."""


attention.register_autograd(_backward, setup_context=_context)

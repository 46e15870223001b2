"""Attention through torch's own kernels, in as few calls as the masks allow.

Neighbouring segments of one length are a call, and so are all rows that see the same groups of keys. With a window or a
lookahead, a call has `ROWS` rows and the keys that any of them sees. A call has a dense mask only where torch needs one.

On a CPU the flash kernels are called directly, because they take grouped queries and hand out the log-sum-exp;
elsewhere `scaled_dot_product_attention` picks a kernel and the backward runs its forward again.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.ops.attention.op import Grads, Masks, allowed_keys, check_attention, key_intervals

ROWS = 128
"""Rows of a call with a window or a lookahead. A call reads up to this many keys more than the window has."""


class _Run(NamedTuple):
    """`many` neighbouring segments of `length` rows each, the first at `start`."""

    start: int
    length: int
    many: int


def runs(cu_seqlens: Tensor, rows: int) -> list[_Run]:
    """Join neighbouring segments of equal length, and leave out empty ones.

    Raises:
        UsageError: The bounds fall, or leave `[0, rows]`.
    """
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] < 0 or bounds[-1] > rows or any(a > b for a, b in pairwise(bounds)):
        raise UsageError(f"attention: cu_seqlens {bounds[:8]}... must rise from 0 to at most {rows} rows")
    found: list[_Run] = []
    for start, end in pairwise(bounds):
        if end > start and found and found[-1].length == end - start:
            found[-1] = found[-1]._replace(many=found[-1].many + 1)
        elif end > start:
            found.append(_Run(start, end - start, 1))
    return found


def _segments(x: Tensor, run: _Run) -> Tensor:
    """View `[1, H, S, D]` as `[many, H, length, D]`: a view, each segment of the run an element of the batch."""
    rows = x[0, :, run.start : run.start + run.length * run.many]
    return rows.view(rows.shape[0], run.many, run.length, rows.shape[2]).transpose(0, 1)


_Part = Tensor | slice | None
"""Chosen rows or keys: indices (a copy), neighbours (a view), or all."""


class _Call(NamedTuple):
    """One call of a dense kernel: the part of the rows and keys it covers, its mask, and whether it is plainly causal.

    Rows and keys are chosen within each segment of a run, or from all.
    """

    run: _Run | None = None
    rows: _Part = None
    keys: _Part = None
    mask: Tensor | None = None
    causal: bool = False

    @property
    def has_all_rows(self) -> bool:
        """True if no other call has rows."""
        return self.run is None and self.rows is None

    def of_rows(self, x: Tensor) -> Tensor:
        return self._part(x, self.rows)

    def of_keys(self, x: Tensor) -> Tensor:
        return self._part(x, self.keys)

    def _part(self, x: Tensor, chosen: _Part) -> Tensor:
        within = x if self.run is None else _segments(x, self.run)
        if isinstance(chosen, Tensor):
            return within.index_select(2, chosen)
        return within if chosen is None else within[:, :, chosen]

    def put_rows(self, target: Tensor, part: Tensor) -> None:
        """Write rows, which belong to one call only."""
        if isinstance(self.rows, Tensor):
            target.index_copy_(2, self.rows, part)
        else:
            self.of_rows(target).copy_(part)

    def add_keys(self, target: Tensor, part: Tensor) -> None:
        """Add to keys, which the rows of several calls may see."""
        if isinstance(self.keys, Tensor):
            target.index_add_(2, self.keys, part)
        elif self.rows is None and self.keys is None:
            self.of_keys(target).copy_(part)
        else:
            self.of_keys(target).add_(part)


def _calls(query: Tensor, key: Tensor, masks: Masks, causal: bool) -> Iterator[_Call]:
    if masks.key_groups is not None and masks.visible_groups is not None:
        yield from _group_calls(masks.key_groups, masks.visible_groups)
        return
    length, keys = query.shape[2], key.shape[2]
    masks = _effective(masks.reduced(length, keys))
    if masks.cu_seqlens is None:
        yield from _interval_calls(query, keys, masks, causal, None)
        return
    for run in runs(masks.cu_seqlens, length):
        last = run.start + run.length * run.many
        key_mask, ahead = (
            None if x is None else x[0, run.start : last].view(run.many, run.length)
            for x in (masks.key_mask, masks.lookahead)
        )
        own = Masks(key_mask, lookahead=ahead, window=masks.window).reduced(run.length, run.length)
        yield from _interval_calls(_segments(query, run), run.length, own, causal, run)


def _effective(masks: Masks) -> Masks:
    """Drop masks whose values mask nothing. This reads values, so only on a CPU: on a GPU reading waits for the device, which
    costs more than the mask."""
    key_mask, ahead = masks.key_mask, masks.lookahead
    if key_mask is not None and key_mask.device.type == "cpu" and bool(key_mask.all()):
        key_mask = None
    if ahead is not None and ahead.device.type == "cpu" and not bool(ahead.any()):
        ahead = None
    return masks._replace(key_mask=key_mask, lookahead=ahead)


def _interval_calls(query: Tensor, keys: int, masks: Masks, causal: bool, run: _Run | None) -> Iterator[_Call]:
    """Yield the calls without groups: for the rows and `keys` keys of the whole, or of each segment of a run."""
    length, key_mask = query.shape[2], masks.key_mask
    if masks.window is None and masks.lookahead is None:
        mask, plain = _mask(query, keys, key_mask, causal)
        yield _Call(run, mask=mask, causal=plain)
        return
    start, end = key_intervals(masks, causal, length, keys, query.device)
    ahead = None if masks.lookahead is None else masks.lookahead.amax(0).tolist()
    for first in range(0, length, ROWS):
        last = min(first + ROWS, length) - 1
        low = 0 if masks.window is None else max(0, first + keys - length + 1 - masks.window)
        high = min(keys, last + keys - length + 1 + (0 if ahead is None else ahead[last]))
        if high <= low:
            continue
        rows, seen = slice(first, last + 1), slice(low, high)
        columns = torch.arange(low, high, device=query.device)
        allowed = (columns >= start[:, rows, None]) & (columns < end[:, rows, None])
        if key_mask is not None:
            allowed = allowed & (key_mask[:, None, seen] != 0)
        one = length == 1 and key_mask is None  # the only query sees the whole interval
        mask = None if one else _additive(allowed.unsqueeze(1), query)
        yield _Call(run, None if length == 1 else rows, seen, mask)


def _additive(allowed: Tensor, query: Tensor) -> Tensor:
    """Return a mask to add to the scores of `query`, in its dtype and for all of its batch."""
    additive = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device)
    additive = additive.masked_fill_(~allowed, float("-inf"))
    return additive.expand(query.shape[0], *additive.shape[1:])


def _group_calls(key_groups: Tensor, visible_groups: Tensor) -> Iterator[_Call]:
    """Yield one call for all rows that see the same groups: they need no mask, only their keys."""
    patterns, run_of_row = (visible_groups != 0).unique_consecutive(dim=0, return_inverse=True)
    patterns, pattern_of_run = patterns.unique(dim=0, return_inverse=True)
    pattern_of_row = pattern_of_run[run_of_row]
    for number, pattern in enumerate(patterns):
        seen = pattern[key_groups.to(torch.int64)]
        keys = None if bool(seen.all()) else seen.nonzero().squeeze(1)
        if keys is None or len(keys):
            yield _Call(rows=(pattern_of_row == number).nonzero().squeeze(1), keys=keys)


def _mask(query: Tensor, keys: int, key_mask: Tensor | None, causal: bool) -> tuple[Tensor | None, bool]:
    """Return an additive mask if one is needed, and whether the kernel's causal flag (aligned to the start) suffices."""
    length = query.shape[2]
    causal = causal and length > 1  # the only query is the last one: it sees every key
    if key_mask is None and (not causal or length == keys):
        return None, causal
    if causal or key_mask is None:
        allowed = allowed_keys(length, keys, Masks(key_mask), causal, query.device)
    else:
        allowed = (key_mask != 0)[:, None, None, :]
    return _additive(allowed, query).expand(-1, -1, length, keys), False


def _rows_first(x: Tensor) -> Tensor:
    """Allocate `[B, Hq, S, D]` in the memory order of the `[B, S, Hq, D]` result."""
    batch, heads, length, dim = x.shape
    return x.new_zeros((batch, length, heads, dim)).transpose(1, 2)


def logsumexp_like(query: Tensor) -> Tensor:
    """Return zeros `[B, Hq, S]` in the dtype that kernels accumulate in."""
    return query.new_zeros(query.shape[:3], dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)


def _lane_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def sdpa_forward(
    query: Tensor, key: Tensor, value: Tensor, masks: Masks, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute `attention_reference` and the log-sum-exp `[B, Hq, S]` (zeros where the kernel keeps it to itself)."""
    check_attention(query, key, value, masks, causal)
    query, key, value = _lane_dense(query), _lane_dense(key), _lane_dense(value)
    if query.numel() == 0 or key.numel() == 0:
        return _rows_first(query).transpose(1, 2), logsumexp_like(query)
    calls = _calls(query, key, masks, causal)
    first = next(calls, None)
    if first is not None and first.has_all_rows:
        result, rows = _run_forward(query, first.of_keys(key), first.of_keys(value), first, scale)
        return result.transpose(1, 2).contiguous(), logsumexp_like(query) if rows is None else rows
    out, logsumexp = _rows_first(query), logsumexp_like(query)
    for call in chain(() if first is None else (first,), calls):
        result, rows = _run_forward(call.of_rows(query), call.of_keys(key), call.of_keys(value), call, scale)
        call.put_rows(out, result)
        if rows is not None:
            call.put_rows(logsumexp.unsqueeze(-1), rows.unsqueeze(-1))
    return out.transpose(1, 2), logsumexp


def _run_forward(query: Tensor, key: Tensor, value: Tensor, call: _Call, scale: float) -> tuple[Tensor, Tensor | None]:
    if query.device.type == "cpu":
        out, rows = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, call.causal, attn_mask=call.mask, scale=scale
        )
        return out, rows.contiguous()
    return _any_device(query, key, value, call, scale), None


def _any_device(query: Tensor, key: Tensor, value: Tensor, call: _Call, scale: float) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    mask = call.mask if call.mask is None else call.mask.contiguous()
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=call.causal, scale=scale, enable_gqa=grouped
    )


def sdpa_backward(
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
    """Compute gradients for query, key and value, contiguous; `grad` and `out` are `[B, S, Hq, D]`."""
    query, key, value = _lane_dense(query), _lane_dense(key), _lane_dense(value)
    grad, out = _lane_dense(grad).transpose(1, 2), out.transpose(1, 2)
    shapes = (query.shape, key.shape, value.shape)
    if query.numel() == 0 or key.numel() == 0:
        return query.new_zeros(shapes[0]), key.new_zeros(shapes[1]), value.new_zeros(shapes[2])
    calls = _calls(query, key, masks, causal)
    first = next(calls, None)
    if first is not None and first.has_all_rows and first.keys is None:
        grads = _run_backward(grad, query, key, value, out, logsumexp, first, scale)
        return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()
    whole = (query.new_zeros(shapes[0]), key.new_zeros(shapes[1]), value.new_zeros(shapes[2]))
    for call in chain(() if first is None else (first,), calls):
        rows = call.of_rows(logsumexp.unsqueeze(-1)).squeeze(-1)
        g, q, o = (call.of_rows(x) for x in (grad, query, out))
        k, v = call.of_keys(key), call.of_keys(value)
        grad_query, grad_key, grad_value = _run_backward(g, q, k, v, o, rows, call, scale)
        call.put_rows(whole[0], grad_query)
        call.add_keys(whole[1], grad_key)
        call.add_keys(whole[2], grad_value)
    return whole


def _run_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, rows: Tensor, call: _Call, scale: float
) -> Grads:
    if query.device.type == "cpu":
        grads: Grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, rows, 0.0, call.causal, attn_mask=call.mask, scale=scale
        )
        return grads
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        again = _any_device(leaves[0], leaves[1], leaves[2], call, scale)
    first, second, third = torch.autograd.grad(again, leaves, grad)
    return first, second, third

"""Attention through torch's own kernels: packed segments one run at a time, a dense mask only where torch needs one.

On a CPU the flash kernels are called directly, because they take grouped queries and hand out the log-sum-exp;
elsewhere `scaled_dot_product_attention` picks a kernel and the backward runs its forward again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.ops.attention import allowed_keys, check_attention

Grads = tuple[Tensor, Tensor, Tensor]


class _Run(NamedTuple):
    """`many` neighbouring segments of `length` rows each, the first at `start`."""

    start: int
    length: int
    many: int


def runs(cu_seqlens: Tensor, rows: int) -> list[_Run]:
    """Segments with neighbours of equal length joined, empty ones left out.

    Raises:
        UsageError: the bounds fall, or leave `[0, rows]`.
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
    """`[1, H, S, D]` as `[many, H, length, D]`: a view, each segment of the run an element of the batch."""
    rows = x[0, :, run.start : run.start + run.length * run.many]
    return rows.view(rows.shape[0], run.many, run.length, rows.shape[2]).transpose(0, 1)


class _Call(NamedTuple):
    """One call of a dense kernel: the part of the rows it covers, its mask, and whether it is plainly causal."""

    run: _Run | None
    mask: Tensor | None
    causal: bool

    def part(self, x: Tensor) -> Tensor:
        return x if self.run is None else _segments(x, self.run)


def _calls(
    query: Tensor, key: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, bias: Tensor | None, causal: bool
) -> Iterator[_Call]:
    # Asking a GPU whether the mask is all ones would make the host wait for it; on a CPU it costs next to nothing.
    if key_mask is not None and key_mask.device.type == "cpu" and bool(key_mask.all()):
        key_mask = None
    if cu_seqlens is None:
        mask, plain = _mask(query, key.shape[2], key_mask, bias, causal)
        yield _Call(None, mask, plain)
        return
    for run in runs(cu_seqlens, query.shape[2]):
        # A bias may differ between segments of a run: take these one by one.
        alone = (_Run(run.start + n * run.length, run.length, 1) for n in range(run.many))
        pieces: Iterable[_Run] = (run,) if bias is None else alone
        for piece in pieces:
            part = _segments(query, piece)
            last = piece.start + piece.length * piece.many
            keys = None if key_mask is None else key_mask[0, piece.start : last].view(piece.many, piece.length)
            mask, plain = _mask(part, piece.length, keys, _cut(bias, piece), causal)
            yield _Call(piece, mask, plain)


def _cut(bias: Tensor | None, run: _Run) -> Tensor | None:
    """The block of a bias that belongs to a segment; dimensions of size one still broadcast."""
    if bias is None:
        return None
    for dim in (-2, -1):
        if bias.dim() >= -dim and bias.shape[dim] > 1:
            bias = bias.narrow(dim, run.start, run.length)
    return bias


def _mask(
    query: Tensor, keys: int, key_mask: Tensor | None, bias: Tensor | None, causal: bool
) -> tuple[Tensor | None, bool]:
    """An additive mask if one is needed, and whether the kernel's causal flag (aligned to the start) says it all."""
    batch, _, length, _ = query.shape
    causal = causal and length > 1  # the only query is the last one: it sees every key
    if key_mask is None and bias is None and (not causal or length == keys):
        return None, causal
    allowed = allowed_keys(length, keys, key_mask, None, causal, query.device)
    additive = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device)
    additive = additive.masked_fill_(~allowed, float("-inf"))
    if bias is not None:
        # The lowest float32, which masks often hold, must not turn into -inf: softmax of a row of it is even, not zero.
        finite = bias.clamp(min=torch.finfo(query.dtype).min)
        additive = additive + torch.where(bias == float("-inf"), bias, finite).to(query.dtype)
    return additive.expand(batch, additive.shape[1], length, keys), False


def _rows_first(x: Tensor) -> Tensor:
    """`[B, Hq, S, D]` in the memory order of the `[B, S, Hq, D]` result."""
    batch, heads, length, dim = x.shape
    return x.new_zeros((batch, length, heads, dim)).transpose(1, 2)


def logsumexp_like(query: Tensor) -> Tensor:
    """Zeros `[B, Hq, S]` in the dtype that kernels accumulate in."""
    return query.new_zeros(query.shape[:3], dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)


def _lane_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def sdpa_forward(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None,
    bias: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attention_reference` and the log-sum-exp `[B, Hq, S]` (zeros where the kernel keeps it to itself)."""
    check_attention(query, key, value, key_mask, cu_seqlens, bias)
    query, key, value = _lane_dense(query), _lane_dense(key), _lane_dense(value)
    if query.numel() == 0 or key.numel() == 0:
        return _rows_first(query).transpose(1, 2), logsumexp_like(query)
    if cu_seqlens is None:
        (call,) = _calls(query, key, key_mask, None, bias, causal)
        result, rows = _run_forward(query, key, value, call, scale)
        return result.transpose(1, 2).contiguous(), logsumexp_like(query) if rows is None else rows
    out, logsumexp = _rows_first(query), logsumexp_like(query)
    for call in _calls(query, key, key_mask, cu_seqlens, bias, causal):
        result, rows = _run_forward(call.part(query), call.part(key), call.part(value), call, scale)
        call.part(out).copy_(result)
        if rows is not None:
            call.part(logsumexp.unsqueeze(-1)).copy_(rows.unsqueeze(-1))
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
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None,
    bias: Tensor | None, out: Tensor, logsumexp: Tensor, causal: bool, scale: float,
) -> Grads:  # fmt: skip
    """Gradients for query, key and value, contiguous; `grad` and `out` are `[B, S, Hq, D]`."""
    query, key, value = _lane_dense(query), _lane_dense(key), _lane_dense(value)
    grad, out = _lane_dense(grad).transpose(1, 2), out.transpose(1, 2)
    shapes = (query.shape, key.shape, value.shape)
    if query.numel() == 0 or key.numel() == 0:
        return query.new_zeros(shapes[0]), key.new_zeros(shapes[1]), value.new_zeros(shapes[2])
    if cu_seqlens is None:
        (call,) = _calls(query, key, key_mask, None, bias, causal)
        grads = _run_backward(grad, query, key, value, out, logsumexp, call, scale)
        return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()
    whole = (query.new_zeros(shapes[0]), key.new_zeros(shapes[1]), value.new_zeros(shapes[2]))
    for call in _calls(query, key, key_mask, cu_seqlens, bias, causal):
        rows = call.part(logsumexp.unsqueeze(-1)).squeeze(-1)
        g, q, k, v, o = (call.part(x) for x in (grad, query, key, value, out))
        for target, piece in zip(whole, _run_backward(g, q, k, v, o, rows, call, scale), strict=True):
            call.part(target).copy_(piece)
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

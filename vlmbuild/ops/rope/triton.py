"""The Triton kernel of `vlmbuild::mrope_rotate` and its backward: query and key in one launch, each table row read once."""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from vlmbuild.ops.triton_util import Launch, power_of_two, require_device

_TILE = 1024
"""Values of half heads that a program turns at a time: 16 bytes of bfloat16 a thread, of both halves."""


@triton.jit  # type: ignore[untyped-decorator]
def _turn_heads(  # type: ignore[no-untyped-def]
    x,
    out,
    x_head,
    x_lane,
    out_head,
    out_lane,
    cos,
    sin,
    lanes,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rotate all heads of one row, TILE of them at a time."""
    for first_head in tl.static_range(0, HEADS, TILE):
        heads = first_head + tl.arange(0, TILE)
        ok = (heads < HEADS)[:, None] & (lanes < HALF)[None, :]
        source = x + heads[:, None] * x_head + lanes[None, :] * x_lane
        target = out + heads[:, None] * out_head + lanes[None, :] * out_lane
        first = tl.load(source, mask=ok, other=0.0).to(tl.float32)
        second = tl.load(source + HALF * x_lane, mask=ok, other=0.0).to(tl.float32)
        tl.store(target, (first * cos - second * sin).to(out.dtype.element_ty), mask=ok)
        tl.store(target + HALF * out_lane, (second * cos + first * sin).to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["seq"])  # type: ignore[untyped-decorator]
def _rotate_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    cos,
    sin,
    out_query,
    out_key,
    seq,
    query_batch,
    query_head,
    query_row,
    query_lane,
    key_batch,
    key_head,
    key_row,
    key_lane,
    outq_batch,
    outq_head,
    outq_row,
    outq_lane,
    outk_batch,
    outk_head,
    outk_row,
    outk_lane,
    cos_batch,
    cos_row,
    cos_lane,
    sin_batch,
    sin_row,
    sin_lane,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    LANES: tl.constexpr,
    BACK: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
):
    # 64-bit offsets: batch * heads * sequence * head_dim can pass 2**31.
    batch = (tl.program_id(0) // seq).to(tl.int64)
    position = (tl.program_id(0) % seq).to(tl.int64)
    lanes = tl.arange(0, LANES)
    lane_ok = lanes < HALF
    c = tl.load(cos + batch * cos_batch + position * cos_row + lanes * cos_lane, mask=lane_ok, other=0.0)[None, :]
    s = tl.load(sin + batch * sin_batch + position * sin_row + lanes * sin_lane, mask=lane_ok, other=0.0)[None, :]
    if BACK:
        s = -s
    source = query + batch * query_batch + position * query_row
    target = out_query + batch * outq_batch + position * outq_row
    _turn_heads(
        source, target, query_head, query_lane, outq_head, outq_lane, c, s, lanes, QUERY_HEADS, HALF, QUERY_TILE
    )
    source = key + batch * key_batch + position * key_row
    target = out_key + batch * outk_batch + position * outk_row
    _turn_heads(source, target, key_head, key_lane, outk_head, outk_lane, c, s, lanes, KEY_HEADS, HALF, KEY_TILE)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Return strides over batch, head, row, lane; a packed `[N, H, D]` tensor is one batch."""
    return x.stride() if x.dim() == 4 else (0, x.stride(1), x.stride(0), x.stride(2))


def _table_strides(x: Tensor) -> tuple[int, ...]:
    return x.stride() if x.dim() == 3 else (0, *x.stride())


def rotate_triton(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> tuple[Tensor, Tensor]:
    """Compute `vlmbuild.ops.rope.op.rotate_reference` on the GPU (or in Triton's interpreter), without copying strided inputs.

    The shapes must fit; `back` rotates the other way.

    Raises:
        DeviceError: The tensors are not where Triton runs.
    """
    require_device("mrope_rotate", query)
    out_query, out_key = torch.empty_like(query), torch.empty_like(key)
    if cos.numel():
        rotate_launch(query, key, cos, sin, out_query, out_key, back=back).run()
    return out_query, out_key


def rotate_launch(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, out_query: Tensor, out_key: Tensor, *, back: bool = False
) -> Launch:
    """Return the launch of the kernel into `out_query` and `out_key`."""
    half = query.shape[-1] // 2
    lanes = power_of_two(half)
    seq = cos.shape[-2]
    rows = cos.shape[0] * seq if cos.dim() == 3 else seq
    arguments = (
        query,
        key,
        cos,
        sin,
        out_query,
        out_key,
        seq,
        *_strides(query),
        *_strides(key),
        *_strides(out_query),
        *_strides(out_key),
        *_table_strides(cos),
        *_table_strides(sin),
    )
    heads = {"QUERY": query.shape[1], "KEY": key.shape[1]}
    most = max(1, _TILE // lanes)
    constants: dict[str, Any] = {
        **{f"{name}_HEADS": many for name, many in heads.items()},
        "HALF": half,
        "LANES": lanes,
        "BACK": back,
    }
    tile: dict[str, Any] = {f"{name}_TILE": min(most, power_of_two(many)) for name, many in heads.items()}
    # Contracting a product and a sum into one rounding would differ from the formula in the last bit.
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
    return Launch(_rotate_kernel, (rows,), arguments, constants, tile | options)


def launches(arguments: tuple[Any, ...], target: int, backward: bool) -> tuple[Launch, ...]:
    """Return the launches of a call of the operator; the backward is on the contiguous gradients that attention returns."""
    query, key, cos, sin = arguments
    forward = rotate_launch(query, key, cos, sin, torch.empty_like(query), torch.empty_like(key))
    if not backward:
        return (forward,)
    grads = (query.new_empty(query.shape), key.new_empty(key.shape))
    outs = (torch.empty_like(grads[0]), torch.empty_like(grads[1]))
    return forward, rotate_launch(*grads, cos, sin, *outs, back=True)

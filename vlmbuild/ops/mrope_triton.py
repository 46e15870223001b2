"""The Triton kernel of `vlmbuild::mrope_rotate`: query and key in one launch, each table row read once."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from vlmbuild.ops._triton import Launch, power_of_two, require_device
from vlmbuild.ops.mrope import _check_rotate


@triton.jit  # type: ignore[untyped-decorator]
def _turn_heads(  # type: ignore[no-untyped-def]
    x, out, x_head, x_lane, out_head, out_lane, x_rows, out_rows, cos, sin, mask, lanes,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    for head in range(HEADS):
        source = x + x_rows[:, None] + head * x_head + lanes[None, :] * x_lane
        target = out + out_rows[:, None] + head * out_head + lanes[None, :] * out_lane
        first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + HALF * x_lane, mask=mask, other=0.0).to(tl.float32)
        tl.store(target, (first * cos - second * sin).to(out.dtype.element_ty), mask=mask)
        tl.store(target + HALF * out_lane, (second * cos + first * sin).to(out.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_kernel(  # type: ignore[no-untyped-def]
    query, key, cos, sin, out_query, out_key, rows, seq,
    query_batch, query_head, query_row, query_lane,
    key_batch, key_head, key_row, key_lane,
    outq_batch, outq_head, outq_row, outq_lane,
    outk_batch, outk_head, outk_row, outk_lane,
    cos_batch, cos_row, cos_lane,
    sin_batch, sin_row, sin_lane,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # 64-bit offsets: batch * heads * sequence * head_dim can pass 2**31.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)
    mask = (row < rows)[:, None] & (lanes < HALF)[None, :]
    batch, place = row // seq, row % seq
    cos_at = (batch * cos_batch + place * cos_row)[:, None] + lanes[None, :] * cos_lane
    sin_at = (batch * sin_batch + place * sin_row)[:, None] + lanes[None, :] * sin_lane
    c = tl.load(cos + cos_at, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + sin_at, mask=mask, other=0.0).to(tl.float32)
    _turn_heads(
        query, out_query, query_head, query_lane, outq_head, outq_lane,
        batch * query_batch + place * query_row, batch * outq_batch + place * outq_row,
        c, s, mask, lanes, QUERY_HEADS, HALF,
    )  # fmt: skip
    _turn_heads(
        key, out_key, key_head, key_lane, outk_head, outk_lane,
        batch * key_batch + place * key_row, batch * outk_batch + place * outk_row,
        c, s, mask, lanes, KEY_HEADS, HALF,
    )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides over batch, head, row, lane; a packed `[N, H, D]` tensor is one batch."""
    return x.stride() if x.dim() == 4 else (0, x.stride(1), x.stride(0), x.stride(2))


def _table_strides(x: Tensor) -> tuple[int, ...]:
    return x.stride() if x.dim() == 3 else (0, *x.stride())


def rotate_triton(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`vlmbuild.ops.mrope.rotate_reference` on the GPU (or in Triton's interpreter), without copying strided inputs.

    Raises:
        UsageError: shapes do not fit.
        DeviceError: the tensors are not where Triton runs.
    """
    _check_rotate(query, key, cos, sin)
    require_device("mrope_rotate", query)
    out_query, out_key = torch.empty_like(query), torch.empty_like(key)
    if cos.numel():
        rotate_launch(query, key, cos, sin, out_query, out_key).run()
    return out_query, out_key


def rotate_launch(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, out_query: Tensor, out_key: Tensor) -> Launch:
    """The launch of the kernel into `out_query` and `out_key`."""
    half = query.shape[-1] // 2
    seq = cos.shape[-2]
    rows = cos.shape[0] * seq if cos.dim() == 3 else seq
    block = 4 if rows >= 512 else 1
    arguments = (
        query, key, cos, sin, out_query, out_key, rows, seq,
        *_strides(query), *_strides(key), *_strides(out_query), *_strides(out_key),
        *_table_strides(cos), *_table_strides(sin),
    )  # fmt: skip
    # Contracting a product and a sum into one rounding would differ from the formula in the last bit.
    constants = {
        "QUERY_HEADS": query.shape[1], "KEY_HEADS": key.shape[1], "HALF": half, "LANES": power_of_two(half),
        "ROWS": block, "num_warps": 4, "enable_fp_fusion": False,
    }  # fmt: skip
    return Launch(_rotate_kernel, (triton.cdiv(rows, block),), arguments, constants)

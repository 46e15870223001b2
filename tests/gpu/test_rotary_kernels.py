"""The rotation's kernel: bit for bit the reference, on the layouts that models have, and its own inverse."""

from __future__ import annotations

import pytest
import torch
from exactness import DTYPES, near, randn

pytest.importorskip("triton", reason="triton is Linux only")

from vlmbuild.ops.rope.op import rotate_reference
from vlmbuild.ops.rope.triton import rotate_triton


def layouts(layout: str, dim: int, heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Query, key, and angles."""
    if layout == "slices of a fused projection":
        fused = randn(5, (heads + 2 * kv_heads) * dim, dtype=dtype).view(5, -1, dim)
        return fused[:, :heads], fused[:, heads : heads + kv_heads], randn(5, dim // 2)
    query = randn(2, 3, heads, dim, dtype=dtype).transpose(1, 2)
    key = randn(2, 3, kv_heads, dim, dtype=dtype).transpose(1, 2)
    if layout == "heads first":
        query, key = query.contiguous(), key.contiguous()
    return query, key, randn(2, 3, dim // 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "layout"),
    [(80, 3, 3, "slices of a fused projection"), (64, 4, 1, "rows first"), (128, 12, 2, "heads first")],
)
def test_rotation(dtype, dim, heads, kv_heads, layout):
    query, key, angle = layouts(layout, dim, heads, kv_heads, dtype)
    cos, sin = angle.cos(), angle.sin()
    for back in (False, True):
        actual = rotate_triton(query, key, cos, sin, back=back)
        expected = rotate_reference(query, key, cos, -sin if back else sin)
        for have, want in zip(actual, expected, strict=True):
            assert torch.equal(have, want)
            assert have.stride() == want.stride()
    first, second = query.double().chunk(2, -1)
    wide_cos, wide_sin = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    exact = torch.cat((first * wide_cos - second * wide_sin, second * wide_cos + first * wide_sin), -1)
    near(rotate_triton(query, key, cos, sin)[0], exact)
    turned = rotate_triton(*rotate_triton(query, key, cos, sin), cos, sin, back=True)
    near(turned[0], query)


def test_more_heads_than_a_tile_has():
    query, key, angle = randn(3, 40, 128), randn(3, 17, 128), randn(3, 64)
    actual = rotate_triton(query, key, angle.cos(), angle.sin())
    for have, want in zip(actual, rotate_reference(query, key, angle.cos(), angle.sin()), strict=True):
        assert torch.equal(have, want)

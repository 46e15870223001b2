"""Kernels that `attention_auto` chooses on a GPU, and torch's variable-length attention with a stand-in for its kernel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vlmbuild.ops import tiles
from vlmbuild.ops.attention import lowered, varlen
from vlmbuild.ops.attention.op import Masks, attention_reference, attention_reference_backward

SEGMENTS = torch.tensor([0, 3, 8, 8, 9], dtype=torch.int64)


def query(dtype=torch.bfloat16, dim=64, cuda=True):
    """Make a stand-in with the facts about a tensor that the choice reads."""
    return SimpleNamespace(is_cuda=cuda, dtype=dtype, shape=(1, 4, 12, dim), device="cuda", numel=lambda: 48 * dim)


def chosen(monkeypatch, masks, measured=False, capability=(9, 0), **facts):
    monkeypatch.setattr(tiles, "runs_by_default", lambda kernel, tensor: measured)
    monkeypatch.setattr(tiles, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    forward, backward = lowered.auto_kernels(query(**facts), masks)
    name = forward.__name__.strip("_").removesuffix("_forward")
    assert backward.__name__.strip("_") == f"{name}_backward"
    return name


def test_measured_kernels_take_everything(monkeypatch):
    for masks in (Masks(), Masks(cu_seqlens=SEGMENTS), Masks(key_mask=SEGMENTS)):
        assert chosen(monkeypatch, masks, measured=True) == "triton"


@pytest.mark.parametrize(
    ("masks", "facts", "name"),
    [
        (Masks(cu_seqlens=SEGMENTS), {}, "varlen"),
        (Masks(cu_seqlens=SEGMENTS), {"dtype": torch.float32}, "sdpa"),
        (Masks(cu_seqlens=SEGMENTS), {"dim": 260}, "sdpa"),
        (Masks(cu_seqlens=SEGMENTS), {"dim": 36}, "sdpa"),
        (Masks(cu_seqlens=SEGMENTS), {"capability": (7, 5)}, "sdpa"),
        (Masks(key_mask=SEGMENTS, cu_seqlens=SEGMENTS), {}, "sdpa"),
        (Masks(key_mask=SEGMENTS), {}, "sdpa"),
        (Masks(), {}, "sdpa"),
        (Masks(cu_seqlens=SEGMENTS, window=3), {}, "varlen"),
        (Masks(cu_seqlens=SEGMENTS, lookahead=SEGMENTS), {}, "triton"),
        (Masks(key_mask=SEGMENTS, window=3), {}, "sdpa"),
        (Masks(key_groups=SEGMENTS, visible_groups=SEGMENTS), {}, "triton"),
        (Masks(key_groups=SEGMENTS, visible_groups=SEGMENTS), {"dtype": torch.float64}, "sdpa"),
    ],
)
def test_unmeasured_kernels_are_for_masks_that_no_library_takes(monkeypatch, masks, facts, name):
    assert chosen(monkeypatch, masks, **facts) == name


def per_segment(query, key, value, bounds, key_bounds, longest, longest_key, *, scale, window_size, enable_gqa):
    """Compute `torch.nn.attention.varlen.varlen_attn`, one segment after the other."""
    assert bounds is key_bounds
    assert bounds.dtype == torch.int32
    assert longest == longest_key == 5
    parts = []
    before, after = (longest if many < 0 else many for many in window_size)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril(after).triu(-before)
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
            )[0].transpose(0, 1)
        )
    return torch.cat(parts)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 1), (True, 3)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_varlen_forward_and_backward(monkeypatch, causal, window, kv_heads):
    """Empty and one-token segments, grouped heads, windows, and rows past the last segment."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", per_segment)
    q = torch.randn(1, 12, 4, 16).transpose(1, 2)
    k, v = (torch.randn(1, 12, kv_heads, 16).transpose(1, 2) for _ in range(2))
    masks = Masks(cu_seqlens=SEGMENTS, window=window)
    out, sums = varlen.varlen_forward(q, k, v, masks, causal, 0.3)
    torch.testing.assert_close(out, attention_reference(q, k, v, masks, causal, 0.3))
    assert out[:, 9:].eq(0).all()
    grad = torch.randn_like(out)
    grads = varlen.varlen_backward(grad, q, k, v, masks, out, sums, causal, 0.3)
    for one, other in zip(grads, attention_reference_backward(grad, q, k, v, masks, causal, 0.3), strict=True):
        torch.testing.assert_close(one, other)
        assert one.is_contiguous()


def test_varlen_without_rows(monkeypatch):
    x = torch.randn(1, 2, 3, 8)
    masks = Masks(cu_seqlens=torch.tensor([0, 0]))
    out, sums = varlen.varlen_forward(x, x, x, masks, True, 0.3)
    assert out.eq(0).all()
    assert all(grad.eq(0).all() for grad in varlen.varlen_backward(out, x, x, x, masks, out, sums, True, 0.3))

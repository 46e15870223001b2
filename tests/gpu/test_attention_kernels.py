"""Attention's kernels against the reference in float64, forward and backward, and against torch's own 16-bit error."""

from __future__ import annotations

import pytest
import torch
from exactness import DEVICE, DTYPES, error, lookahead, near, randn

pytest.importorskip("triton", reason="triton is Linux only")

from vlmbuild.errors import UsageError
from vlmbuild.ops.attention.op import Masks, attention_reference, attention_reference_backward, flat
from vlmbuild.ops.attention.triton import attention_backward_triton, attention_forward_triton

GPU = DEVICE == "cuda"
SCALE = 0.2
DIMS = (24, 40, 64, 80, 96, 128)
ALL = [(dim, dtype) for dim in DIMS for dtype in DTYPES]


def padding(batch: int, keys: int) -> torch.Tensor:
    mask = torch.ones(batch, keys, dtype=torch.long, device=DEVICE)
    mask[0, :3] = 0
    mask[-1, keys - 2 :] = 0
    return mask


def check(query, key, value, masks=Masks(), causal=False):  # type: ignore[no-untyped-def]
    """Check values and all gradients; returns the output and its errors."""
    grad = randn(query.shape[0], query.shape[2], query.shape[1], query.shape[3], dtype=query.dtype)
    wide = [x.double() for x in (query, key, value)]
    exact = attention_reference(*wide, masks, causal, SCALE)
    out, logsumexp = attention_forward_triton(query, key, value, masks, causal, SCALE)
    assert out.is_contiguous()
    assert out.dtype == query.dtype
    near(out, exact)
    exact_grads = attention_reference_backward(grad.double(), *wide, masks, causal, SCALE)
    grads = attention_backward_triton(grad, query, key, value, masks, out, logsumexp, causal, SCALE)
    for have, want in zip(grads, exact_grads, strict=True):
        assert have.isfinite().all()
        near(have, want)
    return out, [error(a, b) for a, b in zip((out, *grads), (exact, *exact_grads), strict=True)]


@pytest.mark.parametrize(
    ("dim", "dtype", "causal"),
    [(*case, causal) for case in ALL for causal in (False, True)]
    if GPU
    else [(24, torch.float32, True), (80, torch.float16, True), (80, torch.float32, False), (64, torch.float32, False)],
)
def test_packed_segments(dim, dtype, causal):
    """Segments of one token, empty ones, some that fill no block, and rows that belong to none; slices of one projection, of
    which a text model's queries share a key head."""
    cu_seqlens = torch.tensor([0, 3, 20, 20, 21, 35, 35, 35], dtype=torch.int32, device=DEVICE)
    heads = (2, 1, 1) if causal else (2, 2, 2)
    query, key, value = randn(38, sum(heads), dim, dtype=dtype).transpose(0, 1)[None].split(heads, 1)
    out, _ = check(query, key, value, Masks(cu_seqlens=cu_seqlens), causal)
    assert out[:, 35:].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES[: None if GPU else 1])
@pytest.mark.parametrize(
    ("length", "keys", "masked", "causal"),
    [(1, 21, True, True), (5, 20, True, True), (20, 6, False, True), (20, 20, True, False), (19, 35, False, False)],
)
def test_dense(dtype, length, keys, masked, causal):
    query = randn(2, length, 4, 24, dtype=dtype).transpose(1, 2)
    key, value = randn(2, 2, keys, 24, dtype=dtype), randn(2, keys, 2, 24, dtype=dtype).transpose(1, 2)
    check(query, key, value, Masks(padding(2, keys) if masked else None), causal)


@pytest.mark.parametrize("dtype", DTYPES[: None if GPU else 1])
@pytest.mark.parametrize(
    ("window", "blocks", "masked"), [(5, (), False), (None, ((3, 9), (22, 34)), True), (7, ((3, 9), (22, 34)), False)]
)
def test_windows_and_blocks_of_packed_segments(dtype, window, blocks, masked):
    """Windows that end within tiles, a block longer than the window, and rows past the last segment."""
    cu_seqlens = torch.tensor([0, 3, 20, 20, 21, 35], dtype=torch.int32, device=DEVICE)
    ahead = lookahead(38, blocks).to(DEVICE) if blocks else None
    query, key = randn(1, 4, 38, 24, dtype=dtype), randn(1, 2, 38, 24, dtype=dtype)
    mask = padding(1, 38) if masked else None
    out, _ = check(query, key, key + 1, Masks(mask, cu_seqlens, lookahead=ahead, window=window), True)
    assert out[:, 35:].eq(0).all()


@pytest.mark.parametrize(("length", "keys", "masked"), [(1, 70, True), (33, 70, False), (40, 40, True), (20, 6, False)])
def test_windows_and_blocks_over_a_cache(length, keys, masked):
    """Samples with blocks of their own, and a window that skips whole tiles of keys."""
    query, key = randn(2, 4, length, 24), randn(2, 2, keys, 24)
    mask = padding(2, keys) if masked else None
    check(query, key, key + 1, Masks(mask, window=18), True)
    ahead = lookahead(length, ((0, length // 2),), ((length // 4, length),)).to(DEVICE)
    check(query, key, key + 1, Masks(mask, lookahead=ahead, window=18), True)


def test_packed_causal_with_boolean_padding():
    cu_seqlens = torch.tensor([0, 9, 23], dtype=torch.int32, device=DEVICE)
    query, key = randn(1, 4, 23, 32), randn(1, 2, 23, 32)
    check(query, key, key + 1, Masks(padding(1, 23).bool(), cu_seqlens), True)


@pytest.mark.parametrize(("dim", "dtype"), ALL if GPU else [(80, torch.float32), (32, torch.float16)])
def test_groups_of_keys(dim, dtype):
    """Two images of two tiles with padding, and text that sees one, all, or none of their tiles."""
    key_groups = torch.tensor(([0] * 9 + [1] * 3) * 2 + ([2] * 9 + [3] * 3) * 2, dtype=torch.int32, device=DEVICE)
    visible = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], device=DEVICE)
    visible = visible.repeat_interleave(7, 0)[:33].bool()
    query, key = randn(1, 4, 33, dim, dtype=dtype), randn(1, 2, 48, dim, dtype=dtype)
    out, _ = check(query, key, key + 1, Masks(None, None, key_groups, visible))
    assert out[:, 28:].eq(0).all()


@pytest.mark.parametrize(("groups", "ordered"), [(31, False), (33, True), (70, False)])
def test_more_groups_than_a_word_has_bits(groups, ordered):
    generator = torch.Generator().manual_seed(groups)
    key_groups = torch.randint(groups, (34,), generator=generator, dtype=torch.int32).to(DEVICE)
    visible = (torch.rand(21, groups, generator=generator) > 0.7).to(DEVICE)
    visible[3:18] = False
    visible[5, groups - 1] = True
    query, key = randn(1, 2, 21, 32), randn(1, 1, 34, 32)
    check(query, key, key + 1, Masks(None, None, key_groups.sort().values if ordered else key_groups, visible))


def test_attention_of_nothing():
    query, key = randn(1, 2, 4, 32), randn(1, 2, 0, 32)
    out, logsumexp = attention_forward_triton(query, key, key, Masks(), False, SCALE)
    assert out.eq(0).all()
    grads = attention_backward_triton(out + 1, query, key, key, Masks(), out, logsumexp, False, SCALE)
    assert grads[0].eq(0).all()


def test_the_backward_gives_the_same_bits_twice():
    query, key = randn(1, 4, 37, 32), randn(1, 2, 37, 32)
    out, logsumexp = attention_forward_triton(query, key, key, Masks(), True, SCALE)
    arguments = (out, query, key, key, Masks(), out, logsumexp, True, SCALE)
    for first, second in zip(attention_backward_triton(*arguments), attention_backward_triton(*arguments), strict=True):
        assert torch.equal(first, second)


def test_half_precision_is_as_near_as_torchs_own():
    dtype = torch.bfloat16 if GPU else torch.float16
    query, key, value = randn(3, 1, 4, 48, 64, dtype=dtype).unbind(0)
    _, errors = check(query, key, value, causal=True)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=SCALE)
    grad = randn(1, 48, 4, 64, dtype=dtype)
    grads = torch.autograd.grad(theirs, leaves, grad.transpose(1, 2))
    wide = [x.double() for x in (query, key, value)]
    exact = attention_reference(*wide, Masks(), True, SCALE)
    exact_grads = attention_reference_backward(grad.double(), *wide, Masks(), True, SCALE)
    limits = [error(theirs.transpose(1, 2), exact), *map(error, grads, exact_grads)]
    for have, limit in zip(errors, limits, strict=True):
        assert have <= 1.2 * limit, (errors, limits)


def test_a_scale_must_be_positive():
    query = randn(1, 1, 4, 32)
    with pytest.raises(UsageError, match="scale -0.2 is not above zero"):
        attention_forward_triton(query, query, query, Masks(), False, -0.2)


@pytest.mark.parametrize("operator", ["attention_triton", "attention_auto"])
def test_operator_gradients(operator):
    query, key, value = (x.clone().requires_grad_() for x in randn(3, 2, 2, 9, 32))
    call = getattr(torch.ops.vlmbuild, operator)
    arguments = (query, key, value, padding(2, 9), None, None, None, True, SCALE)
    expected = flat(attention_reference)(*arguments)
    for have, want in zip(
        torch.autograd.grad(call(*arguments).square().sum(), (query, key, value)),
        torch.autograd.grad(expected.square().sum(), (query, key, value)),
        strict=True,
    ):
        near(have, want)

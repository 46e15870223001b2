"""Triton kernels against their references, forward and backward: on a GPU, or on a CPU in Triton's interpreter.

`tests/test_ops_triton.py` runs this file in the interpreter, which has to be chosen before triton is imported.
"""

from __future__ import annotations

import os

import pytest
import torch

GPU = torch.cuda.is_available()
INTERPRETED = not GPU and os.environ.get("TRITON_INTERPRET") == "1"
if not GPU and not INTERPRETED:
    pytest.skip("needs a CUDA GPU, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="triton is Linux only")

# Only past the skips above: the kernels' modules import triton.
from vlmbuild.ops.attention import attention_reference, attention_reference_backward  # noqa: E402
from vlmbuild.ops.attention_triton import attention_backward_triton, attention_forward_triton  # noqa: E402
from vlmbuild.ops.linear_4bit import dequantize_4bit, linear_4bit  # noqa: E402
from vlmbuild.ops.linear_4bit_triton import dequantize_4bit_triton, linear_4bit_triton  # noqa: E402
from vlmbuild.ops.mrope import rotate_reference  # noqa: E402
from vlmbuild.ops.mrope_triton import rotate_triton  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
# The interpreter truncates to bfloat16 and cannot multiply it, so half precision stands for 16 bits there.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if GPU else (torch.float32, torch.float16)
# Sums in another order: rounding of float32 over some tens of terms; one step of the output's dtype for 16 bits.
ATOL = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def close(actual: torch.Tensor, expected: torch.Tensor, factor: float = 1.0) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=ATOL[actual.dtype] * factor, rtol=ATOL[actual.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(80, 3, 3), (32, 4, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_rotation(dtype: torch.dtype, dim: int, heads: int, kv_heads: int, packed: bool) -> None:
    if packed:
        both = randn(11, heads + kv_heads, dim, dtype=dtype)
        query, key = both[:, :heads], both[:, heads:]
        angle = randn(11, dim // 2)
    else:
        query = randn(2, 7, heads, dim, dtype=dtype).transpose(1, 2)
        key = randn(2, 7, kv_heads, dim, dtype=dtype).transpose(1, 2)
        angle = randn(2, 7, dim // 2)
    cos, sin = angle.cos(), angle.sin()
    for actual, expected in zip(
        rotate_triton(query, key, cos, sin), rotate_reference(query, key, cos, sin), strict=True
    ):
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()
    back = rotate_triton(*rotate_triton(query, key, cos, sin), cos, -sin)
    close(back[0], query.clone(memory_format=torch.preserve_format), 2)


def test_rotation_of_many_rows() -> None:
    query, angle = randn(1, 2, 600, 40), randn(1, 600, 20)
    actual = rotate_triton(query, query, angle.cos(), angle.sin())
    assert torch.equal(actual[0], rotate_reference(query, query, angle.cos(), angle.sin())[0])


def padding(batch: int, keys: int) -> torch.Tensor:
    mask = torch.ones(batch, keys, dtype=torch.long, device=DEVICE)
    mask[0, :3] = 0
    mask[-1, keys - 2 :] = 0
    return mask


def check_attention(query, key, value, key_mask, cu_seqlens, causal, factor=1.0, groups=(None, None)) -> None:  # type: ignore[no-untyped-def]
    masks = (key_mask, cu_seqlens, *groups)
    grad = randn(query.shape[0], query.shape[2], query.shape[1], query.shape[3], dtype=query.dtype)
    expected = attention_reference(query, key, value, *masks, causal, 0.2)
    actual, logsumexp = attention_forward_triton(query, key, value, *masks, causal, 0.2)
    close(actual, expected, factor)
    assert actual.is_contiguous()
    wanted = attention_reference_backward(grad, query, key, value, *masks, causal, 0.2)
    grads = attention_backward_triton(grad, query, key, value, *masks, actual, logsumexp, causal, 0.2)
    for have, want in zip(grads, wanted, strict=True):
        close(have, want.contiguous(), 4 * factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 40, 64, 80, 96, 128] if GPU else [40, 128])
def test_packed_segments(dtype: torch.dtype, dim: int) -> None:
    cu_seqlens = torch.tensor([0, 3, 20, 20, 21, 35, 35, 35], dtype=torch.int32, device=DEVICE)
    query, key, value = randn(38, 6, dim, dtype=dtype).view(1, 38, 3, 2, dim).permute(2, 0, 3, 1, 4).unbind(0)
    check_attention(query, key, value, None, cu_seqlens, False)
    assert attention_forward_triton(query, key, value, None, cu_seqlens, None, None, False, 0.2)[0][0, 35:].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES[: None if GPU else 1])
@pytest.mark.parametrize(("length", "keys"), [(19, 19), (1, 21), (5, 21), (21, 6)])
@pytest.mark.parametrize(("masked", "causal"), [(True, True), (False, True), (True, False), (False, False)])
def test_dense(dtype: torch.dtype, length: int, keys: int, masked: bool, causal: bool) -> None:
    query = randn(2, length, 6, 24, dtype=dtype).transpose(1, 2)
    key, value = randn(2, 2, keys, 24, dtype=dtype), randn(2, keys, 2, 24, dtype=dtype).transpose(1, 2)
    check_attention(query, key, value, padding(2, keys) if masked else None, None, causal)


def test_packed_causal_with_boolean_padding() -> None:
    cu_seqlens = torch.tensor([0, 9, 23], dtype=torch.int32, device=DEVICE)
    query, key = randn(1, 4, 23, 32), randn(1, 2, 23, 32)
    check_attention(query, key, key + 1, padding(1, 23).bool(), cu_seqlens, True)


def test_attention_of_nothing() -> None:
    query, key = randn(1, 2, 4, 32), randn(1, 2, 0, 32)
    out, logsumexp = attention_forward_triton(query, key, key, None, None, None, None, False, 0.2)
    assert out.eq(0).all()
    grads = attention_backward_triton(out + 1, query, key, key, None, None, None, None, out, logsumexp, False, 0.2)
    assert grads[0].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 128] if GPU else [40])
def test_groups_of_keys(dtype: torch.dtype, dim: int) -> None:
    """Two images of two tiles with padding, and text that sees one, all, or none of their tiles."""
    key_groups = torch.tensor(([0] * 9 + [1] * 3) * 2 + ([2] * 9 + [3] * 3) * 2, dtype=torch.int32, device=DEVICE)
    visible = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], device=DEVICE)
    visible = visible.repeat_interleave(7, 0)[:33].bool()
    query, key = randn(1, 4, 33, dim, dtype=dtype), randn(1, 2, 48, dim, dtype=dtype)
    check_attention(query, key, key + 1, None, None, False, groups=(key_groups, visible))


@pytest.mark.parametrize("operator", ["attention_triton", "attention_auto"])
def test_operator_gradients(operator: str) -> None:
    query, key, value = (randn(2, 2, 9, 32, dtype=torch.float32).requires_grad_() for _ in range(3))
    call = getattr(torch.ops.vlmbuild, operator)
    arguments = (query, key, value, padding(2, 9), None, None, None, True, 0.2)
    expected = attention_reference(*arguments)
    for have, want in zip(
        torch.autograd.grad(call(*arguments).square().sum(), (query, key, value)),
        torch.autograd.grad(expected.square().sum(), (query, key, value)),
        strict=True,
    ):
        close(have, want, 10)


def packed_weight(out: int, wide: int, blocksize: int, quant_type: str, nested: bool) -> tuple[torch.Tensor, ...]:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        randn(out, wide), blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    return packed, state.absmax, state.state2.absmax if nested else None, state.offset if nested else None


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("out", "wide", "blocksize"), [(3, 7, 64), (300, 70, 64), (6, 48, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(quant_type: str, nested: bool, out: int, wide: int, blocksize: int, dtype: torch.dtype) -> None:
    buffers = packed_weight(out, wide, blocksize, quant_type, nested)
    geometry = (wide, out, blocksize, quant_type, dtype)
    assert torch.equal(dequantize_4bit_triton(*buffers, *geometry), dequantize_4bit(*buffers, *geometry))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(nested: bool, biased: bool, dtype: torch.dtype) -> None:
    buffers = packed_weight(70, 96, 32, "nf4", nested)
    x, bias = randn(3, 5, 96, dtype=dtype), randn(70, dtype=dtype) if biased else None
    arguments = (x, *buffers, bias, 96, 70, 32, "nf4", torch.float32)
    close(linear_4bit_triton(*arguments), linear_4bit(*arguments), 4)

"""The 4-bit linear layer against real bitsandbytes: bits, gradients, what autograd keeps, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from vlmbuild.errors import UsageError
from vlmbuild.formats import BLOCK_SIZES
from vlmbuild.ops.linear_4bit.dequantize import (
    Packed4bit,
    code_8bit,
    dense_scales,
    dequantize_4bit,
    dequantize_reference,
)
from vlmbuild.ops.linear_4bit.op import linear_4bit, linear_4bit_bitsandbytes

functional = pytest.importorskip("bitsandbytes.functional")
Buffers = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def quantize(weight: torch.Tensor, blocksize: int, quant_type: str, nested: bool):  # type: ignore[no-untyped-def]
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    return (packed, state.absmax, state.state2.absmax if nested else None, state.offset if nested else None), state


def layer(dtype: torch.dtype = torch.float32, nested: bool = True):  # type: ignore[no-untyped-def]
    """Arguments of the operator for a 64 -> 24 layer, and its dense weight."""
    buffers, state = quantize(torch.randn(24, 64).to(dtype), 64, "nf4", nested)
    return buffers, (64, 24, 64, "nf4", dtype), functional.dequantize_4bit(buffers[0], state)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("out", "wide", "blocksize"),
    [(48, 64, 64), (70, 128, 32), (9, 256, 128), (3, 512, 256), (2, 512, 512), (2, 1024, 1024), (300, 64, 32)],
)
def test_bit_identical_to_bitsandbytes(  # type: ignore[no-untyped-def]
    quant_type: str, nested: bool, dtype: torch.dtype, out: int, wide: int, blocksize: int
) -> None:
    buffers, state = quantize(torch.randn(out, wide).to(dtype), blocksize, quant_type, nested)
    expected = functional.dequantize_4bit(buffers[0], state)
    packed = Packed4bit(*buffers, wide, out, blocksize, quant_type, dtype)
    assert torch.equal(dequantize_4bit(packed), expected)
    assert torch.equal(dequantize_reference(packed), expected)


@given(
    out=st.integers(1, 12),
    wide=st.integers(1, 140),
    blocksize=st.sampled_from(BLOCK_SIZES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    nested=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_ragged_shapes(out: int, wide: int, blocksize: int, quant_type: str, nested: bool) -> None:
    """Blocks over the ends of rows, where bitsandbytes' CPU kernel for the two-dimensional shape is wrong.

    The same values as one long row of whole blocks, padded with zeros, are the ground truth.
    """
    buffers, _ = quantize(torch.randn(out, wide), blocksize, quant_type, nested)
    values = out * wide
    blocks = -(-values // blocksize)
    padded = torch.zeros(blocks * blocksize // 2, dtype=torch.uint8)
    padded[: buffers[0].numel()] = buffers[0].flatten()
    packed = Packed4bit(*buffers, wide, out, blocksize, quant_type, torch.float32)
    if blocksize < 2048:
        long = torch.ops.bitsandbytes.dequantize_4bit(
            padded, dense_scales(packed), blocksize, quant_type, (blocks, blocksize), torch.float32
        )
    else:
        long = dequantize_reference(packed._replace(weight=padded, in_features=blocksize, out_features=blocks))
    actual = dequantize_4bit(packed)
    assert torch.equal(actual, long.flatten()[:values].view(out, wide))


def test_nested_code_is_the_one_in_the_state() -> None:
    _, state = quantize(torch.randn(24, 64), 64, "nf4", True)
    assert torch.equal(state.state2.code, code_8bit(torch.device("cpu")))
    assert state.state2.blocksize == 256


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64), (2, 0, 64)])
@pytest.mark.parametrize("biased", [False, True])
def test_forward_and_gradients(nested: bool, shape: tuple[int, ...], biased: bool) -> None:
    buffers, geometry, dense = layer(nested=nested)
    x = torch.randn(shape, requires_grad=True)
    bias = torch.randn(24, requires_grad=True) if biased else None
    leaves = (x, bias) if bias is not None else (x,)
    actual, expected = linear_4bit(x, *buffers, bias, *geometry), F.linear(x, dense, bias)
    assert torch.equal(actual, expected)
    weight = torch.randn_like(actual)
    for have, want in zip(
        torch.autograd.grad((actual * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(have, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64,), (2, 5, 64), (2, 0, 64)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_product_of_cuda_tensors(nested: bool, shape: tuple[int, ...], biased: bool, weight_dtype: torch.dtype) -> None:
    """The GPU path on CPU tensors, where bitsandbytes has the same operator without its kernel."""
    buffers, geometry, dense = layer(weight_dtype, nested)
    x, bias = torch.randn(*shape), torch.randn(geometry[1]) if biased else None
    product = linear_4bit_bitsandbytes(x, *buffers, bias, *geometry)
    assert torch.equal(product, F.linear(x, dense.float(), bias))


def test_weight_rounds_to_its_own_dtype_before_the_inputs() -> None:
    buffers, geometry, dense = layer(torch.bfloat16)
    assert dense.dtype == torch.bfloat16
    x = torch.randn(3, 64)
    assert torch.equal(linear_4bit(x, *buffers, None, *geometry), F.linear(x, dense.float()))
    half = x.to(torch.bfloat16)
    bias = torch.randn(24, requires_grad=True)
    out = linear_4bit(half, *buffers, bias, *geometry)
    assert torch.equal(out, F.linear(half, dense, bias.to(torch.bfloat16)))
    out.float().sum().backward()
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32


def test_autograd_keeps_packed_tensors_only() -> None:
    buffers, geometry, _ = layer()
    saved: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = linear_4bit(torch.randn(5, 64, requires_grad=True), *buffers, None, *geometry)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in buffers}
    # Nothing hides on the context either.
    context = out.grad_fn
    assert not [x for x in vars(context).values() if isinstance(x, torch.Tensor)]


def test_compiled_graph_keeps_packed_tensors_only() -> None:
    buffers, geometry, dense = layer()
    saved: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved.append(x)
        return x

    compiled = torch.compile(lambda x: linear_4bit(x, *buffers, None, *geometry), backend="aot_eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        compiled(torch.randn(5, 64, requires_grad=True)).sum().backward()
    assert all(x.numel() < dense.numel() for x in saved)


def test_opcheck() -> None:
    for nested in (False, True):
        buffers, geometry, _ = layer(nested=nested)
        x, bias = torch.randn(2, 5, 64, requires_grad=True), torch.randn(24, requires_grad=True)
        opcheck(torch.ops.vlmbuild.linear_4bit.default, (x, *buffers, bias, *geometry))
        opcheck(torch.ops.vlmbuild.linear_4bit.default, (x, *buffers, None, *geometry))
        opcheck(torch.ops.vlmbuild.linear_4bit_backward.default, (torch.randn(2, 5, 24), *buffers, *geometry))


def test_compiles_once_for_all_shapes_with_gradients() -> None:
    buffers, geometry, _ = layer()
    counter = CompileCounterWithBackend("aot_eager")

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.vlmbuild.linear_4bit(x, *buffers, None, *geometry).sin().sum()

    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    for batch, length in ((2, 5), (3, 9), (7, 4)):
        x = torch.randn(batch, length, 64, requires_grad=True)
        (actual,) = torch.autograd.grad(compiled(x), x)
        (expected,) = torch.autograd.grad(model(x), x)
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


def test_exports_on_meta_with_symbolic_sizes() -> None:
    buffers, geometry, _ = layer()

    class Model(torch.nn.Module):
        def forward(self, x, weight, absmax, nested_absmax, nested_offset):  # type: ignore[no-untyped-def]
            return torch.ops.vlmbuild.linear_4bit(x, weight, absmax, nested_absmax, nested_offset, None, *geometry)

    example = (torch.empty(3, 5, 64, device="meta"), *(x.to("meta") for x in buffers))
    sizes = ({0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=4096)}, None, None, None, None)
    program = torch.export.export(Model(), example, dynamic_shapes=sizes)
    (call,) = [node for node in program.graph.nodes if node.op == "call_function"]
    assert str(call.target) == "vlmbuild.linear_4bit.default"
    assert call.meta["val"].shape[2] == 24


def test_errors_say_what_does_not_fit() -> None:
    (weight, absmax, nested_absmax, offset), geometry, _ = layer()
    x, good = torch.randn(2, 64), (weight, absmax, nested_absmax, offset)
    for bad, message in (
        ((torch.randn(2, 63), *good, None), r"wanted \[..., 64\]"),
        ((x.long(), *good, None), "16- or 32-bit float"),
        ((x, *good, torch.randn(25)), r"bias of shape \(25,\); wanted \[24\]"),
        ((x, weight[:-1], *good[1:], None), "weight has 767 elements .* need 768"),
        ((x, weight.to(torch.int8), *good[1:], None), "of torch.int8"),
        ((x, weight, absmax[1:], nested_absmax, offset, None), "absmax has 23 elements"),
        ((x, weight, absmax, None, None, None), "need 24 of torch.float32"),
        ((x, weight, absmax, nested_absmax, None, None), "come together"),
        ((x, weight, absmax, nested_absmax.repeat(2), offset, None), "nested_absmax has 2 elements"),
    ):
        with pytest.raises(UsageError, match=message):
            linear_4bit(*bad, *geometry)
        with pytest.raises(UsageError, match=message):
            linear_4bit(*(None if t is None else t.to("meta") for t in bad), *geometry)
    for options in ((48, "nf4", torch.float32), (64, "int4", torch.float32), (64, "nf4", torch.float64)):
        with pytest.raises(UsageError, match="wanted 'nf4' or 'fp4'"):
            linear_4bit(x, *good, None, 64, 24, *options)

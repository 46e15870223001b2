"""The 4-bit linear layer's paths on a CPU: exact enough, in agreement, and what they keep in memory."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from vlmbuild.ops.linear_4bit import cpu as linear_4bit_cpu
from vlmbuild.ops.linear_4bit import dequantize
from vlmbuild.ops.linear_4bit.dequantize import Packed4bit, dequantize_4bit, dequantize_reference
from vlmbuild.ops.linear_4bit.op import linear_4bit

functional = pytest.importorskip("bitsandbytes.functional")
Buffers = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]

# Fused or not: the error of a product in bfloat16 against exact arithmetic, as a multiple of that of `F.linear` on the
# weight in bfloat16.
ERROR_RATIO = 1.1
needs_fused = pytest.mark.skipif(not linear_4bit_cpu.has_fused_product(), reason="a processor without AVX512-BF16")


def quantize(weight: torch.Tensor, blocksize: int, quant_type: str, nested: bool):  # type: ignore[no-untyped-def]
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    return (packed, state.absmax, state.state2.absmax if nested else None, state.offset if nested else None), state


def error_ratio(x: torch.Tensor, buffers: Buffers, geometry, bias=None) -> float:  # type: ignore[no-untyped-def]
    exact = dequantize_reference(Packed4bit(*buffers, *geometry[:4], torch.float32))
    truth = F.linear(x.double(), exact.double(), None if bias is None else bias.double())
    ours = linear_4bit(x, *buffers, bias, *geometry).double() - truth
    plain = F.linear(x, exact.to(geometry[4]).bfloat16(), bias).double() - truth
    return (ours.norm() / plain.norm()).item()


@pytest.mark.parametrize(
    ("kind", "rows", "quant_type", "blocksize"),
    [
        *((kind, rows, "nf4", 64) for kind in ("centred", "shifted", "positive", "channels") for rows in (1, 16, 130)),
        *(("shifted", 3, kind, size) for kind, size in (("nf4", 32), ("nf4", 128), ("nf4", 256), ("fp4", 64))),
    ],
)
def test_as_exact_as_bfloat16(kind: str, rows: int, quant_type: str, blocksize: int) -> None:
    """The table's rounding alone shifts the weight's mean, which an input with a mean shows."""
    torch.manual_seed(rows)
    out, wide = 2048, 1536
    buffers, _ = quantize((torch.randn(out, wide) * 0.02).bfloat16(), blocksize, quant_type, True)
    x = torch.randn(rows, wide)
    x = {"centred": x, "shifted": x + 1, "positive": x.relu(), "channels": x + 3 * torch.randn(wide).exp()}[kind]
    geometry = (wide, out, blocksize, quant_type, torch.bfloat16)
    assert error_ratio(x.bfloat16(), buffers, geometry) <= ERROR_RATIO
    bias = torch.randn(out).bfloat16()
    assert error_ratio(x.bfloat16(), buffers, geometry, bias) <= ERROR_RATIO


@pytest.mark.parametrize(
    ("dtype", "out", "wide", "blocksize"),
    [
        *((dtype, 1024, 1024, 64) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        *((torch.bfloat16, *sizes) for sizes in ((1000, 1100, 64), (33, 64, 64), (32, 96, 64))),
        *((torch.bfloat16, *sizes) for sizes in ((1100, 1000, 2048), (640, 1024, 512))),
    ],
)
@pytest.mark.parametrize("rows", [16, 17])
def test_every_path_agrees_with_the_dense_product(
    dtype: torch.dtype, out: int, wide: int, blocksize: int, rows: int
) -> None:
    buffers, _ = quantize(torch.randn(out, wide).to(dtype), blocksize, "nf4", True)
    geometry = (wide, out, blocksize, "nf4", dtype)
    dense = dequantize_reference(Packed4bit(*buffers, *geometry))
    x = torch.randn(2, rows, wide).to(dtype)[0].requires_grad_()
    actual, expected = linear_4bit(x, *buffers, None, *geometry), F.linear(x, dense)
    fused = buffers[0].untyped_storage() in linear_4bit_cpu._REPACKED
    scale = expected.float().abs().max()
    assert (actual - expected).float().abs().max() <= (2**-7 * scale if fused else 0)
    upstream = torch.randn_like(expected)
    (have,), (want,) = (torch.autograd.grad(y, x, upstream) for y in (actual, expected))
    torch.testing.assert_close(have, want, rtol=0, atol=2**-7 * want.float().abs().max().item())


@needs_fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_product_follows_its_weight(dtype: torch.dtype) -> None:
    (weight, absmax, *nested), _ = quantize(torch.randn(64, 128).to(dtype), 64, "nf4", True)
    geometry, x = (128, 64, 64, "nf4", dtype), torch.randn(1, 128).bfloat16()

    def product() -> torch.Tensor:
        return linear_4bit(x, weight, absmax, *nested, None, *geometry)

    before = product()
    kept = linear_4bit_cpu._REPACKED[weight.untyped_storage()]
    (copied,) = kept.values()
    assert torch.equal(linear_4bit(x, weight.view(-1), absmax, *nested, None, *geometry), before)
    assert next(iter(kept.values())) is copied  # a view of the weight needs no other copy
    absmax.copy_(absmax.flip(0))
    assert not torch.equal(product(), before)
    absmax.copy_(absmax.flip(0))
    weight.bitwise_not_()
    assert not torch.equal(product(), before)
    weight.bitwise_not_()
    assert torch.equal(product(), before)
    torch.ops.vlmbuild.linear_4bit_backward(torch.randn(20, 64), weight, absmax, *nested, *geometry)
    assert weight.untyped_storage() not in linear_4bit_cpu._REPACKED  # training gives the copy's memory back


@needs_fused
def test_copies_die_with_their_weights_and_are_for_few_rows_only() -> None:
    gc.collect()
    others = len(linear_4bit_cpu._REPACKED)
    (weight, *scales), _ = quantize(torch.randn(64, 128).bfloat16(), 64, "nf4", True)
    geometry = (128, 64, 64, "nf4", torch.bfloat16)
    for shape, copies in (((17, 128), 0), ((0, 128), 0), ((2, 8, 128), 1), ((128,), 1)):
        assert linear_4bit(torch.randn(shape).bfloat16(), weight, *scales, None, *geometry).shape == (*shape[:-1], 64)
        assert len(linear_4bit_cpu._REPACKED) == others + copies
    del weight
    gc.collect()
    assert len(linear_4bit_cpu._REPACKED) == others
    with torch.inference_mode():
        buffers, state = quantize(torch.randn(64, 128).bfloat16(), 64, "nf4", True)
        x = torch.randn(1, 128).bfloat16()
        expected = F.linear(x, functional.dequantize_4bit(buffers[0], state))
        assert torch.equal(linear_4bit(x, *buffers, None, *geometry), expected)
    assert len(linear_4bit_cpu._REPACKED) == others


def test_dense_weights_share_one_buffer_and_results_do_not() -> None:
    x, layers = torch.randn(20, 512), []
    for _ in range(2):
        buffers, state = quantize(torch.randn(1024, 512), 64, "nf4", True)
        layers.append((buffers, functional.dequantize_4bit(buffers[0], state)))
    geometry = (512, 1024, 64, "nf4", torch.float32)
    results = [linear_4bit(x, *buffers, None, *geometry) for buffers, _ in layers]
    buffer = dequantize._SCRATCH.buffer.data_ptr()
    assert dequantize._SCRATCH.buffer.numel() >= 1024 * 512 * 4
    for result, (buffers, dense) in zip(results, layers, strict=True):
        assert torch.equal(result, F.linear(x, dense))
        with torch.inference_mode():
            assert torch.equal(linear_4bit(x, *buffers, None, *geometry), result)
        own = dequantize_4bit(Packed4bit(*buffers, *geometry))
        assert torch.equal(own, dense)
        assert own.untyped_storage().data_ptr() != buffer
    assert dequantize._SCRATCH.buffer.data_ptr() == buffer

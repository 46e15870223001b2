"""Products with 4-bit weights against float64 products with bitsandbytes' dequantized weight; dequantization bit for bit."""

from __future__ import annotations

import pytest
import torch
from exactness import DTYPES, near, randn

pytest.importorskip("triton", reason="triton is Linux only")

from vlmbuild.ops.linear_4bit import triton as kernels
from vlmbuild.ops.linear_4bit.op import dequantize_4bit

# Features, lanes, block size: neither whole tiles nor whole scales; a block larger than a row.
SHAPES = [(70, 192, 64), (33, 320, 32), (20, 256, 128), (16, 192, 4096)]


def layer(out: int, wide: int, blocksize: int, quant_type: str, nested: bool):  # type: ignore[no-untyped-def]
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        randn(out, wide), blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    buffers = (packed, state.absmax, state.state2.absmax if nested else None, state.offset if nested else None)
    return buffers, (wide, out, blocksize, quant_type, torch.float16)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize(quant_type, nested, shape):
    buffers, geometry = layer(*shape, quant_type, nested)
    assert torch.equal(kernels.dequantize_4bit_triton(buffers, geometry), dequantize_4bit(*buffers, *geometry))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_product(dtype, nested, biased, rows, shape):
    out, wide, _ = shape
    buffers, geometry = layer(*shape, "nf4", nested)
    dense = dequantize_4bit(*buffers, *geometry).double()
    x, bias = randn(rows, wide, dtype=dtype), randn(out, dtype=dtype)
    exact = x.double() @ dense.T + (bias.double() if biased else 0)
    near(kernels.linear_4bit_triton(x, buffers, bias if biased else None, geometry), exact)
    grad = randn(rows, out, dtype=dtype)
    near(kernels.grad_input_triton(grad, buffers, geometry), grad.double() @ dense)


@pytest.mark.parametrize("biased", [False, True])
def test_many_rows_go_through_a_dense_weight(biased, monkeypatch):
    monkeypatch.setattr(kernels, "FUSED_ROWS", 4)
    buffers, geometry = layer(*SHAPES[0], "nf4", True)
    x, bias = randn(2, 5, 192, dtype=torch.float16), randn(70)
    exact = x.double() @ dequantize_4bit(*buffers, *geometry).double().T + (bias.double() if biased else 0)
    near(kernels.linear_4bit_triton(x, buffers, bias if biased else None, geometry), exact)


def test_long_rows_are_split_for_few_features():
    buffers, geometry = layer(16, 2048, 64, "nf4", True)
    assert kernels.linear_parts(5, geometry, torch.float16, 90) > 1
    x = randn(5, 2048, dtype=torch.float16)
    near(
        kernels.linear_4bit_triton(x, buffers, None, geometry),
        x.double() @ dequantize_4bit(*buffers, *geometry).double().T,
    )


def test_no_rows():
    buffers, geometry = layer(*SHAPES[0], "nf4", True)
    assert kernels.linear_4bit_triton(randn(0, 192), buffers, None, geometry).shape == (0, 70)
    assert kernels.grad_input_triton(randn(0, 70), buffers, geometry).shape == (0, 192)


def test_what_fits():
    assert kernels.fits((192, 7, 64, "nf4", torch.float16), torch.float16)
    assert not kernels.fits((200, 7, 64, "nf4", torch.float16), torch.float16)  # a row ends inside of a unit
    assert not kernels.fits((192, 7, 64, "nf4", torch.float16), torch.float64)

"""LLM.int8() against bitsandbytes' integers, and float64 products of them and of the outliers; gradients of the weight alone."""

from __future__ import annotations

import pytest
import torch
from exactness import DEVICE, DTYPES, near, randn

pytest.importorskip("triton", reason="triton is Linux only")

from vlmbuild.ops.linear_8bit import triton as kernels
from vlmbuild.ops.linear_8bit.op import dequantize_8bit

# Features, lanes: neither whole tiles nor aligned; one of everything.
SHAPES = [(40, 160), (33, 67), (1, 1)]


def layer(out: int, wide: int) -> tuple[torch.Tensor, torch.Tensor]:
    dense = randn(out, wide)
    scales = dense.abs().amax(1)
    return torch.round(dense * (127 / scales)[:, None]).to(torch.int8), scales


def inputs(rows: int, wide: int, dtype: torch.dtype, columns: tuple[int, ...]) -> torch.Tensor:
    """Values below 6, but for one of each of these columns."""
    x = randn(rows, wide).clamp(-4, 4)
    for place, column in enumerate(columns):
        x[place % rows, column] = -20.0 - place
    return x.to(dtype)


def exact(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, threshold: float) -> torch.Tensor:
    """In float64, of the integers and columns that the method names."""
    half = x.to(torch.float16).double()
    outlier = half.abs() >= threshold if threshold > 0 else torch.zeros_like(half, dtype=torch.bool)
    columns = outlier.any(0)
    row_scales = half.masked_fill(outlier, 0).abs().amax(1, keepdim=True)
    factor = (127 / row_scales.float()).masked_fill(row_scales == 0, 0)
    integers = torch.round(half.float() * factor).masked_fill(columns, 0).double()
    product = integers @ weight.double().T * (row_scales * scales.double() / 127**2)
    dense = dequantize_8bit(weight, scales, x.dtype).double()
    return product + x.double()[:, columns] @ dense[:, columns].T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "threshold"), [((), 6.0), ((0, 50, 66), 6.0), ((0, 50), 0.0)])
@pytest.mark.parametrize("rows", [1, 20])
def test_integers_and_columns_are_bitsandbytes_own(dtype, columns, threshold, rows):
    pytest.importorskip("bitsandbytes")
    x = inputs(rows, 67, dtype, columns)
    half = x.to(torch.float16, copy=True).cpu()
    expected, scales, found = torch.ops.bitsandbytes.int8_vectorwise_quant(half, threshold)
    quantized, row_scales, known = kernels.quantized_rows(x, threshold)
    assert torch.equal(quantized.cpu(), expected)
    assert torch.equal(row_scales.cpu(), scales)
    if threshold:
        assert known[0] == found.numel()
        assert torch.equal(known[1 : 1 + found.numel()].cpu(), found.int())


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if kernels.fits(dtype)])
@pytest.mark.parametrize(("biased", "threshold"), [(False, 6.0), (True, 6.0), (True, 0.0)])
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_gradient(dtype, biased, threshold, rows, shape):
    out, wide = shape
    weight, scales = layer(*shape)
    x, bias = inputs(rows, wide, dtype, (0, wide // 2, wide - 1)), randn(out, dtype=dtype)
    expected = exact(x, weight, scales, threshold) + (bias.double() if biased else 0)
    near(kernels.linear_8bit_triton(x, weight, scales, bias if biased else None, threshold), expected)
    grad = randn(rows, out, dtype=dtype)
    dense = dequantize_8bit(weight, scales, dtype).double()
    near(kernels.grad_input_8bit_triton(grad, weight, scales), grad.double() @ dense)


@pytest.mark.parametrize("columns", [(), tuple(range(40))])
def test_no_column_and_every_column_has_outliers(columns):
    weight, scales = layer(20, 40)
    x = inputs(40, 40, torch.float16, columns)
    near(kernels.linear_8bit_triton(x, weight, scales, None, 6.0), exact(x, weight, scales, 6.0))


def test_outliers_beyond_float16_are_multiplied_as_they_are():
    weight, scales = layer(20, 96)
    x = inputs(5, 96, torch.bfloat16 if torch.bfloat16 in DTYPES else torch.float32, (3,))
    x[:, 3] = 1e6
    near(kernels.linear_8bit_triton(x, weight, scales, None, 6.0), exact(x, weight, scales, 6.0))


def test_long_rows_are_split_for_few_features():
    weight, scales = layer(16, 1024)
    assert kernels.parts_8bit(5, weight, torch.float16, 90) > 1
    x, bias = inputs(5, 1024, torch.float16, (1, 700, 1023)), randn(16)
    near(kernels.linear_8bit_triton(x, weight, scales, bias, 6.0), exact(x, weight, scales, 6.0) + bias.double())


def test_rows_and_features_of_zeros():
    weight, scales = layer(20, 64)
    weight[3], scales[3] = 0, 0
    x = inputs(4, 64, torch.float16, (7,))
    x[2] = 0
    out = kernels.linear_8bit_triton(x, weight, scales, None, 6.0)
    near(out, exact(x, weight, scales, 6.0))
    assert not out[2].any()
    assert not out[:, 3].any()


def test_any_number_of_dimensions_and_no_rows():
    weight, scales = layer(20, 64)
    x = inputs(6, 64, torch.float16, (5,))
    out = kernels.linear_8bit_triton(x, weight, scales, None, 6.0)
    assert torch.equal(kernels.linear_8bit_triton(x.view(2, 3, 64), weight, scales, None, 6.0), out.view(2, 3, 20))
    strided = weight.T.contiguous().T
    assert torch.equal(kernels.linear_8bit_triton(x, strided, scales, None, 6.0), out)
    none = torch.empty(2, 0, 64, device=DEVICE, dtype=torch.float16)
    assert kernels.linear_8bit_triton(none, weight, scales, None, 6.0).shape == (2, 0, 20)
    assert kernels.grad_input_8bit_triton(none[..., :20], weight, scales).shape == (2, 0, 64)

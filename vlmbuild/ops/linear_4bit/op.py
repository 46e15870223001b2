"""Linear layer on a 4-bit weight in the bitsandbytes layout; `vlmbuild.ops.linear_4bit.dequantize` describes the layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.ops.linear_4bit import cpu
from vlmbuild.ops.linear_4bit.dequantize import Packed4bit, check_weight, code_8bit, dequantize_unchecked
from vlmbuild.util.dtypes import FLOATS

_WEIGHT = "Tensor weight, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset"
_GEOMETRY = "int in_features, int out_features, int blocksize, str quant_type, ScalarType weight_dtype"


def _check(input: Tensor, packed: Packed4bit, bias: Tensor | None) -> None:
    if input.dim() < 1 or input.shape[-1] != packed.in_features or input.dtype not in FLOATS:
        raise UsageError(
            f"linear_4bit: input of shape {tuple(input.shape)} and {input.dtype}; wanted [..., {packed.in_features}] of a "
            "16- or 32-bit float"
        )
    if bias is not None and tuple(bias.shape) != (packed.out_features,):
        raise UsageError(f"linear_4bit: bias of shape {tuple(bias.shape)}; wanted [{packed.out_features}]")
    check_weight(packed)


def _split(arguments: tuple[Any, ...]) -> tuple[Packed4bit, Tensor | None]:
    """Split the operator's arguments after the input into weight and bias."""
    return Packed4bit(*arguments[:4], *arguments[5:]), arguments[4]


@torch.library.custom_op(
    "vlmbuild::linear_4bit", mutates_args=(), schema=f"(Tensor input, {_WEIGHT}, Tensor? bias, {_GEOMETRY}) -> Tensor"
)
def linear_4bit(input: Tensor, *arguments: Any) -> Tensor:
    """Compute `input @ weight.T + bias`, `[..., in]` to `[..., out]`; the weight as in `dequantize_4bit`, cast to the input.

    Differentiable in `input` and `bias`. The dequantized weight lives for this call only: the backward makes it again.
    For few rows of bfloat16 on a CPU with AVX512-BF16 there is none, and a repacked copy of an NF4 weight lives as long
    as the weight, unless a backward drops it.
    """
    packed, bias = _split(arguments)
    _check(input, packed, bias)
    if cpu.fits_fused(input, packed, bias):
        return cpu.fused_product(input, packed, bias)
    dense = dequantize_unchecked(packed, reuse=True)
    return F.linear(input, dense.to(input.dtype), None if bias is None else bias.to(input.dtype))


@linear_4bit.register_kernel("cuda")
def linear_4bit_bitsandbytes(input: Tensor, *arguments: Any) -> Tensor:
    """Compute `linear_4bit` with bitsandbytes' own product, which multiplies packed weights where its authors measured that
    this is faster on the chip; with a dense weight for layers that it does not take."""
    packed, bias = _split(arguments)
    _check(input, packed, bias)
    bias = None if bias is None else bias.to(input.dtype)
    if input.dtype != packed.weight_dtype or packed.in_features % packed.blocksize or not input.numel():
        return F.linear(input, dequantize_unchecked(packed).to(input.dtype), bias)
    import bitsandbytes  # noqa: F401

    scales, nested = packed.absmax.contiguous(), {}
    if packed.nested_absmax is not None and packed.nested_offset is not None:
        nested = {
            "absmax_8bit": scales.flatten(),
            "absmax_code": code_8bit(scales.device),
            "absmax_offset": packed.nested_offset.reshape(()),
        }
        scales = packed.nested_absmax.contiguous()
    weight, shape = packed.weight.contiguous().view(-1, 1), (packed.out_features, packed.in_features)
    product: Tensor = torch.ops.bitsandbytes.gemm_4bit(
        input, weight, shape, scales, packed.blocksize, packed.quant_type, bias=bias, **nested
    )
    return product


@linear_4bit.register_fake
def _(input: Tensor, *arguments: Any) -> Tensor:
    packed, bias = _split(arguments)
    _check(input, packed, bias)
    return input.new_empty((*input.shape[:-1], packed.out_features))


@torch.library.custom_op(
    "vlmbuild::linear_4bit_backward", mutates_args=(), schema=f"(Tensor grad, {_WEIGHT}, {_GEOMETRY}) -> Tensor"
)
def linear_4bit_backward(grad: Tensor, *arguments: Any) -> Tensor:
    """Compute the gradient of `linear_4bit` for its input. One operator, so that a compiler cannot keep the dense weight."""
    packed = Packed4bit(*arguments)
    check_weight(packed)
    cpu.forget(packed.weight)
    return (grad @ dequantize_unchecked(packed, reuse=True).to(grad.dtype)).contiguous()


@linear_4bit_backward.register_fake
def _(grad: Tensor, *arguments: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], Packed4bit(*arguments).in_features))


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, absmax, nested_absmax, nested_offset, bias, *ctx.geometry = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(weight, absmax, nested_absmax, nested_offset)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = torch.ops.vlmbuild.linear_4bit_backward(grad, *ctx.saved_tensors, *ctx.geometry)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_input, None, None, None, None, grad_bias, None, None, None, None, None


linear_4bit.register_autograd(_linear_backward, setup_context=_linear_context)

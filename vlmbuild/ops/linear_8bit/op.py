"""Linear layer on an 8-bit weight in the bitsandbytes layout (LLM.int8(), arXiv:2208.07339).

The weight is int8 with a float32 scale for each row: `weight * scale / 127`. Rows of the input are quantized in the
same way for each call, after a cast to float16, and the product is one of integers. Columns of the input in which any
row reaches the threshold are left out of it: a product in the input's dtype adds them.

These columns are sought over all rows of a call, so with a threshold a row's result depends on the rows next to it:
on what else is in the batch, and on how samples are packed. That is the method, and the same in bitsandbytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.util.dtypes import FLOATS

GROUP_VALUES = 2**18
"""Values that a CPU dequantizes at a time: it does so in float32, beside the result."""


def _check(input: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> None:
    """Check sizes and dtypes only, so that tensors without data pass too."""
    _check_weight(weight, scales)
    out_features, in_features = weight.shape
    if input.dim() < 1 or input.shape[-1] != in_features or input.dtype not in FLOATS:
        raise UsageError(
            f"linear_8bit: input of shape {tuple(input.shape)} and {input.dtype}; wanted [..., {in_features}] of a "
            "16- or 32-bit float"
        )
    if bias is not None and (tuple(bias.shape) != (out_features,) or bias.dtype not in FLOATS):
        raise UsageError(
            f"linear_8bit: bias of shape {tuple(bias.shape)} and {bias.dtype}; wanted [{out_features}] of a 16- or "
            "32-bit float"
        )
    if not threshold >= 0:  # also for NaN
        raise UsageError(f"linear_8bit: threshold {threshold}; wanted 0, for no outlier columns, or a positive number")


def _check_weight(weight: Tensor, scales: Tensor) -> None:
    if weight.dtype != torch.int8 or weight.dim() != 2 or 0 in weight.shape:
        raise UsageError(
            f"linear_8bit: weight of shape {tuple(weight.shape)} and {weight.dtype}; wanted [out, in] of torch.int8, "
            "not empty"
        )
    if scales.dtype != torch.float32 or tuple(scales.shape) != (weight.shape[0],):
        raise UsageError(
            f"linear_8bit: scales of shape {tuple(scales.shape)} and {scales.dtype}; wanted [{weight.shape[0]}] of "
            "torch.float32, one for each row of the weight"
        )


def dequantize_8bit(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize the `[out, in]` weight to `dtype`, as gradients go through it, bit-identical to bitsandbytes' own.

    It rounds to `dtype` once, from int8 times a float32 factor; weights in an artifact go through float32.

    Args:
        weight: Values, int8 `[out, in]`.
        scales: Scales, float32 `[out]`.
        dtype: One of float32, float16 and bfloat16.

    Raises:
        UsageError: A buffer's shape or dtype does not fit.
    """
    _check_weight(weight, scales)
    factor = (scales * (1.0 / 127.0)).unsqueeze(1)
    dense = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    rows, columns = weight.shape
    step = max(1, GROUP_VALUES // columns) if weight.device.type == "cpu" else rows
    for start in range(0, rows, step):
        group = slice(start, start + step)
        dense[group].copy_(weight[group]).mul_(factor[group])
    return dense


@torch.library.custom_op(
    "vlmbuild::linear_8bit",
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor scales, Tensor? bias, float threshold) -> Tensor",
)
def linear_8bit(input: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """Compute `input @ (weight * scales / 127).T + bias` as LLM.int8() does, with bitsandbytes' operators.

    On a CPU bit-identical to bitsandbytes' `Linear8bitLt` in evaluation mode. In training that layer does not quantize its
    input there: the input's gradient is the same and the result is not. Differentiable in `input` and `bias`.

    Args:
        input: Input, `[..., in]`, float32, float16 or bfloat16.
        weight: Values, int8 `[out, in]`.
        scales: Scales, float32 `[out]`, the largest magnitude of each row.
        bias: Bias, `[out]`, cast to the input's dtype, or None.
        threshold: Magnitude from which an input is an outlier; 0 for none. Published models have 6.

    Returns:
        `[..., out]`.

    Raises:
        UsageError: A buffer's shape or dtype does not fit, or the threshold is negative.
    """
    _check(input, weight, scales, bias, threshold)
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes; slow, so not at the top)

    ops = torch.ops.bitsandbytes
    shape = (*input.shape[:-1], weight.shape[0])
    if not input.numel():
        return input.new_empty(shape)
    rows, weight, scales = input.reshape(-1, weight.shape[1]).contiguous(), weight.contiguous(), scales.contiguous()
    # On a CPU outliers are put to zero in the quantized tensor itself, and back: never in the caller's.
    half = rows.to(torch.float16, copy=threshold > 0 and rows.device.type == "cpu")
    quantized, row_scales, outliers = ops.int8_vectorwise_quant(half, threshold)
    del half
    bias = None if bias is None else bias.to(input.dtype).contiguous()
    if threshold > 0:
        output, _ = ops.int8_mixed_scaled_mm(rows, quantized, weight, row_scales, scales, outliers, bias)
    else:
        output = ops.int8_scaled_mm(quantized, weight, row_scales, scales, bias=bias, dtype=input.dtype)
    result: Tensor = output.view(shape)
    return result


@linear_8bit.register_fake
def _(input: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    _check(input, weight, scales, bias, threshold)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@torch.library.custom_op(
    "vlmbuild::linear_8bit_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor weight, Tensor scales) -> Tensor",
)
def linear_8bit_backward(grad: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Compute the gradient of `linear_8bit` for its input, `[..., out]` to `[..., in]`, with the dequantized weight.

    One operator, so that a compiler cannot keep the dense weight.

    Raises:
        UsageError: A buffer's shape or dtype does not fit.
    """
    dense = dequantize_8bit(weight, scales, grad.dtype)
    return (grad.reshape(-1, weight.shape[0]) @ dense).view((*grad.shape[:-1], weight.shape[1]))


@linear_8bit_backward.register_fake
def _(grad: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    _check_weight(weight, scales)
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scales, bias, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(weight, scales)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = torch.ops.vlmbuild.linear_8bit_backward(grad, *ctx.saved_tensors)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.bias_dtype)
    return grad_input, None, None, grad_bias, None


linear_8bit.register_autograd(_linear_backward, setup_context=_linear_context)

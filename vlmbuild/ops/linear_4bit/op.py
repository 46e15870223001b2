"""Linear layer on a 4-bit weight in the bitsandbytes layout (QLoRA, arXiv:2305.14314, section 3).

Two values share a byte, the earlier one in the high nibble. Each is an index into a 16-entry table; `blocksize`
consecutive values share a float32 scale. With double quantization the scales are themselves 8-bit indices into
bitsandbytes' dynamic map, scaled per 256 and shifted by one offset.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.formats import BLOCK_SIZES, NESTED_BLOCKSIZE
from vlmbuild.ops.linear_4bit import cpu as linear_4bit_cpu
from vlmbuild.ops.linear_4bit.tables import code_4bit, code_8bit

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_WEIGHT = "Tensor weight, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset"
_GEOMETRY = "int in_features, int out_features, int blocksize, str quant_type, ScalarType weight_dtype"


def check_weight(
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    out_features: int,
    blocksize: int,
    quant_type: str,
    weight_dtype: torch.dtype,
) -> None:
    """Raise UsageError unless every buffer has the size and dtype the geometry needs: kernels do not check.

    Sizes are all that is checked, so this also serves tensors without data.
    """
    if quant_type not in ("nf4", "fp4") or blocksize not in BLOCK_SIZES or weight_dtype not in _FLOATS:
        raise UsageError(
            f"linear_4bit: quant_type {quant_type!r}, blocksize {blocksize}, weight_dtype {weight_dtype}; wanted "
            f"'nf4' or 'fp4', one of {BLOCK_SIZES}, and float32, float16 or bfloat16"
        )
    values = in_features * out_features
    blocks = -(-values // blocksize)
    _check_buffer("weight", weight, torch.uint8, (values + 1) // 2)
    if (nested_absmax is None) != (nested_offset is None):
        raise UsageError("linear_4bit: nested_absmax and nested_offset come together, or not at all")
    if nested_absmax is None or nested_offset is None:
        _check_buffer("absmax", absmax, torch.float32, blocks)
        return
    _check_buffer("absmax", absmax, torch.uint8, blocks)
    _check_buffer("nested_absmax", nested_absmax, torch.float32, -(-blocks // NESTED_BLOCKSIZE))
    _check_buffer("nested_offset", nested_offset, torch.float32, 1)


def _check_buffer(name: str, buffer: Tensor, dtype: torch.dtype, size: int) -> None:
    if buffer.dtype != dtype or buffer.numel() != size:
        raise UsageError(
            f"linear_4bit: {name} has {buffer.numel()} elements of {buffer.dtype}; the layer's shape and block size "
            f"need {size} of {dtype}"
        )


def _check_input(input: Tensor, bias: Tensor | None, in_features: int, out_features: int) -> None:
    if input.dim() < 1 or input.shape[-1] != in_features or input.dtype not in _FLOATS:
        raise UsageError(
            f"linear_4bit: input of shape {tuple(input.shape)} and {input.dtype}; wanted [..., {in_features}] of a "
            "16- or 32-bit float"
        )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise UsageError(f"linear_4bit: bias of shape {tuple(bias.shape)}; wanted [{out_features}]")


def scales_reference(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> Tensor:
    """The float32 scale of every block, in plain torch."""
    if nested_absmax is None or nested_offset is None:
        return absmax
    outer = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    return code_8bit(absmax.device)[absmax.long()] * outer + nested_offset


def dequantize_reference(
    weight: Tensor,
    scales: Tensor,
    in_features: int,
    out_features: int,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    """The `[out, in]` weight from packed values and float32 scales, in plain torch."""
    packed = weight.flatten()
    nibbles = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[: in_features * out_features]
    values = code_4bit(quant_type, weight.device)[nibbles.long()]
    spread = scales.repeat_interleave(blocksize)[: values.numel()]
    return (values * spread).to(dtype).view(out_features, in_features)


def dequantize_4bit(
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    out_features: int,
    blocksize: int,
    quant_type: str,
    weight_dtype: torch.dtype,
) -> Tensor:
    """The `[out_features, in_features]` weight in `weight_dtype`, bit-identical to bitsandbytes' own.

    Args:
        weight: packed uint8, `ceil(out * in / 2)` elements.
        absmax: float32 `[blocks]`; uint8 when the scales are quantized too.
        nested_absmax: float32 `[ceil(blocks / 256)]`, or None.
        nested_offset: float32 scalar, or None.

    Raises:
        UsageError: a buffer's size or dtype does not fit.
    """
    check_weight(
        weight, absmax, nested_absmax, nested_offset, in_features, out_features, blocksize, quant_type, weight_dtype
    )
    return _dequantize(
        weight, absmax, nested_absmax, nested_offset, in_features, out_features, blocksize, quant_type, weight_dtype
    )


def _dequantize(
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    out_features: int,
    blocksize: int,
    quant_type: str,
    weight_dtype: torch.dtype,
    *,
    reuse: bool = False,
) -> Tensor:
    """`dequantize_4bit` unchecked; with `reuse`, on a CPU, possibly in memory that the next such call overwrites."""
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes; slow, so not at the top)

    weight, scales = weight.contiguous(), _scales(absmax, nested_absmax, nested_offset).contiguous()
    values = in_features * out_features
    on_cpu = weight.device.type == "cpu"
    # bitsandbytes has no native CPU kernel for these and would compile one per shape; plain torch is ready at once.
    if on_cpu and (values % blocksize or blocksize >= 2048):
        return dequantize_reference(weight, scales, in_features, out_features, blocksize, quant_type, weight_dtype)
    # Its CPU kernel takes the wrong scale where a block runs over the end of a row, so rows are made of whole blocks.
    rows = (values // blocksize, blocksize) if on_cpu and in_features % blocksize else (out_features, in_features)
    dense: Tensor | None = None
    if on_cpu and reuse:
        dense = linear_4bit_cpu.dequantize_into_scratch(weight, scales, rows, blocksize, quant_type, weight_dtype)
    if dense is None:
        dense = torch.ops.bitsandbytes.dequantize_4bit(weight, scales, blocksize, quant_type, rows, weight_dtype)
    return dense.view(out_features, in_features)


def _scales(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> Tensor:
    """`scales_reference` by bitsandbytes' kernel."""
    if nested_absmax is None or nested_offset is None:
        return absmax
    import bitsandbytes  # noqa: F401

    code, absmax, outer = code_8bit(absmax.device), absmax.contiguous(), nested_absmax.contiguous()
    scales: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(absmax, outer, code, NESTED_BLOCKSIZE, torch.float32)
    return scales + nested_offset


@torch.library.custom_op(
    "vlmbuild::linear_4bit", mutates_args=(), schema=f"(Tensor input, {_WEIGHT}, Tensor? bias, {_GEOMETRY}) -> Tensor"
)
def linear_4bit(
    input: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    blocksize: int,
    quant_type: str,
    weight_dtype: torch.dtype,
) -> Tensor:
    """`input @ weight.T + bias`, `[..., in]` to `[..., out]`; the weight as in `dequantize_4bit`, cast to the input.

    Differentiable in `input` and `bias`. The dequantized weight lives for this call only: the backward makes it again.
    For few rows of bfloat16 on a CPU with AVX512-BF16 there is none, and a repacked copy of an NF4 weight lives as long
    as the weight, unless a backward drops it.
    """
    _check_input(input, bias, in_features, out_features)
    buffers, sizes = (weight, absmax, nested_absmax, nested_offset), (in_features, out_features, blocksize)
    check_weight(*buffers, in_features, out_features, blocksize, quant_type, weight_dtype)
    if linear_4bit_cpu.fits_fused(input, (*buffers, bias), *sizes, quant_type, weight_dtype):
        return linear_4bit_cpu.fused_product(input, buffers, bias, *sizes, lambda: _scales(*buffers[1:]))
    dense = _dequantize(*buffers, in_features, out_features, blocksize, quant_type, weight_dtype, reuse=True)
    return F.linear(input, dense.to(input.dtype), None if bias is None else bias.to(input.dtype))


@linear_4bit.register_kernel("cuda")
def _(
    input: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    blocksize: int,
    quant_type: str,
    weight_dtype: torch.dtype,
) -> Tensor:
    _check_input(input, bias, in_features, out_features)
    buffers, geometry = (weight, absmax, nested_absmax, nested_offset), (in_features, out_features, blocksize)
    check_weight(*buffers, *geometry, quant_type, weight_dtype)
    if kernels := _triton(input.dtype, (*geometry, quant_type, weight_dtype)):
        product: Tensor = kernels.linear_4bit_triton(input, buffers, bias, (*geometry, quant_type, weight_dtype))
        return product
    dense = _dequantize(*buffers, *geometry, quant_type, weight_dtype)
    return F.linear(input, dense.to(input.dtype), None if bias is None else bias.to(input.dtype))


def _triton(dtype: torch.dtype, geometry: tuple[int, int, int, str, torch.dtype]) -> Any:
    """The module of Triton kernels, or None where they do not take the layer or Triton is missing (it is Linux only)."""
    try:
        from vlmbuild.ops.linear_4bit import triton as linear_4bit_triton
    except ModuleNotFoundError:
        return None
    return linear_4bit_triton if linear_4bit_triton.fits(geometry, dtype) else None


@linear_4bit.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    blocksize: int,
    quant_type: str,
    weight_dtype: torch.dtype,
) -> Tensor:
    _check_input(input, bias, in_features, out_features)
    check_weight(
        weight, absmax, nested_absmax, nested_offset, in_features, out_features, blocksize, quant_type, weight_dtype
    )
    return input.new_empty((*input.shape[:-1], out_features))


@torch.library.custom_op(
    "vlmbuild::linear_4bit_backward", mutates_args=(), schema=f"(Tensor grad, {_WEIGHT}, {_GEOMETRY}) -> Tensor"
)
def linear_4bit_backward(
    grad: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    out_features: int,
    blocksize: int,
    quant_type: str,
    weight_dtype: torch.dtype,
) -> Tensor:
    """Gradient of `linear_4bit` for its input. One operator, so that a compiler cannot keep the dense weight."""
    buffers = (weight, absmax, nested_absmax, nested_offset)
    check_weight(*buffers, in_features, out_features, blocksize, quant_type, weight_dtype)
    linear_4bit_cpu.forget(weight)
    dense = _dequantize(*buffers, in_features, out_features, blocksize, quant_type, weight_dtype, reuse=True)
    return (grad @ dense.to(grad.dtype)).contiguous()


@linear_4bit_backward.register_kernel("cuda")
def _(
    grad: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    out_features: int,
    blocksize: int,
    quant_type: str,
    weight_dtype: torch.dtype,
) -> Tensor:
    buffers, geometry = (weight, absmax, nested_absmax, nested_offset), (in_features, out_features, blocksize)
    check_weight(*buffers, *geometry, quant_type, weight_dtype)
    if kernels := _triton(grad.dtype, (*geometry, quant_type, weight_dtype)):
        product: Tensor = kernels.grad_input_triton(grad, buffers, (*geometry, quant_type, weight_dtype))
        return product
    dense = _dequantize(*buffers, *geometry, quant_type, weight_dtype)
    return (grad @ dense.to(grad.dtype)).contiguous()


@linear_4bit_backward.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    out_features: int,
    blocksize: int,
    quant_type: str,
    weight_dtype: torch.dtype,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


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

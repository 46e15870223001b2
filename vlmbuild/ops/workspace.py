"""What operators need inside, beyond arguments and results: tensors without data do not show it.

A workspace is a number of bytes, from an operator's arguments and its result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import vlmbuild.ops  # noqa: F401  registers the operators
from vlmbuild.ops.linear_8bit.op import GROUP_VALUES

Workspace = Callable[[Sequence[Any], Any], int]


def _dequantized(args: Sequence[Any], _: Any) -> int:
    """The dense weight, and the scales before and after their offset if they are quantized too."""
    nested, (in_features, out_features, blocksize, _type, dtype) = args[3], args[-5:]
    values = in_features * out_features
    return int(values * dtype.itemsize + (0 if nested is None else 2 * 4 * math.ceil(values / blocksize)))


def _integers_cpu(args: Sequence[Any], result: Any) -> int:
    """An input's float16, outlier mask and two float32 copies; or its int8 and four of the result in 32 bits."""
    values = args[0].numel()
    return int(max(11 * values, values + 16 * result.numel()) - result.nbytes)


def _integers_cuda(args: Sequence[Any], result: Any) -> int:
    """An input's float16, magnitudes and outlier mask; or its int8 and the result as int32 and float16."""
    values = args[0].numel()
    return int(max(5 * values, values + 6 * result.numel()))


def _dequantized_8bit(args: Sequence[Any], _: Any) -> int:
    """The dense weight."""
    grad, weight, _scales = args
    return int(weight.numel() * grad.dtype.itemsize)


def _dequantized_8bit_cpu(args: Sequence[Any], result: Any) -> int:
    """Also two float32 copies of a group of its rows: so a CPU multiplies 16-bit floats."""
    grad, weight, _scales = args
    group = min(weight.numel(), max(GROUP_VALUES, weight.shape[1]))
    return _dequantized_8bit(args, result) + (8 * group if grad.dtype.itemsize == 2 else 0)


def _attention_parts(args: Sequence[Any], _: Any) -> int:
    """torch's kernels run once per segment or pattern: their result before it is put into its rows, and chosen rows."""
    query, key, value, _mask, _bounds, groups = args[:6]
    return int(query.nbytes + (0 if groups is None else query.nbytes + key.nbytes + value.nbytes))


def _attention_gradient_parts(args: Sequence[Any], _: Any) -> int:
    """The same for gradients of query, key and value, and chosen rows of what the forward kept."""
    grad, query, key, value, _mask, _bounds, groups = args[:7]
    parts = query.nbytes + key.nbytes + value.nbytes
    return int(parts + (0 if groups is None else parts + 2 * grad.nbytes))


def _rolled(args: Sequence[Any], _: Any) -> int:
    """Without Triton: whole tables of cosines and sines, and the query with its halves swapped in float32; for other dtypes
    itself and its product by the cosine, too."""
    query, _key, cos, _sin = args
    return int(query.numel() * (4 if query.dtype == torch.float32 else 12) + 16 * cos.numel())


def _promoted(args: Sequence[Any], result: Any) -> int:
    """A CPU brings operands to the result's dtype in memory; a GPU does it on the way."""
    if not isinstance(result, Tensor) or not result.is_floating_point():
        return 0
    other = (value.numel() for value in args if isinstance(value, Tensor) and value.dtype != result.dtype)
    return sum(other) * result.dtype.itemsize


def _wide_sum(args: Sequence[Any], result: Any) -> int:
    """Of 16-bit floats: the sum in float32, and the layer's input."""
    base, values = args[:2]
    return 0 if base.dtype == torch.float32 else int(4 * base.numel() + max(0, 4 * values.numel() - result.nbytes))


def _wide_gradients(args: Sequence[Any], _: Any) -> int:
    """Of 16-bit floats: gradient, input and the input's gradient in float32."""
    grad, values = args[:2]
    return 0 if values.dtype == torch.float32 else int(4 * grad.numel() + 8 * values.numel())


_OPS = torch.ops.vlmbuild
_EVERYWHERE: dict[Any, Workspace] = {
    _OPS.linear_4bit.default: _dequantized,
    _OPS.linear_4bit_backward.default: _dequantized,
    _OPS.lora.default: _wide_sum,
    _OPS.lora_backward.default: _wide_gradients,
    _OPS.attention_sdpa_forward.default: _attention_parts,
    _OPS.attention_sdpa_backward.default: _attention_gradient_parts,
}
WORKSPACES: dict[str, dict[Any, Workspace]] = {
    "cuda": {
        **_EVERYWHERE,  # `auto` is Triton there, whose kernels need nothing, and so is the rotation
        _OPS.linear_8bit.default: _integers_cuda,
        _OPS.linear_8bit_backward.default: _dequantized_8bit,
    },
    "cpu": {
        **_EVERYWHERE,
        _OPS.linear_8bit.default: _integers_cpu,
        _OPS.linear_8bit_backward.default: _dequantized_8bit_cpu,
        _OPS.attention_auto_forward.default: _attention_parts,
        _OPS.attention_auto_backward.default: _attention_gradient_parts,
        _OPS.mrope_rotate.default: _rolled,
        _OPS.mrope_rotate_backward.default: _rolled,
        torch.Tag.pointwise: _promoted,
    },
}
"""Device -> operator, or a tag that operators have -> workspace."""

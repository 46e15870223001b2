"""Formulas of the memory that operators need beyond arguments and results, which tensors without data do not show.

Each returns a number of bytes from an operator's arguments, its result, and the device ("cpu" or "cuda") that both are on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmbuild.ops.attention.sdpa import ROWS
from vlmbuild.ops.linear_8bit.op import GROUP_VALUES

Workspace = Callable[[Sequence[Any], Any, str], int]


def dense_4bit(args: Sequence[Any], _: Any, _device: str) -> int:
    """Count the dense weight, and the scales before and after their offset if they are quantized too."""
    nested, (in_features, out_features, blocksize, _type, dtype) = args[3], args[-5:]
    values = in_features * out_features
    return int(values * dtype.itemsize + (0 if nested is None else 2 * 4 * math.ceil(values / blocksize)))


def integers(args: Sequence[Any], result: Any, device: str) -> int:
    """Count an input's float16, its magnitudes or outlier mask; or its int8 and the result as integers and floats."""
    values = args[0].numel()
    if device == "cpu":
        return int(max(11 * values, values + 16 * result.numel()) - result.nbytes)
    return int(max(5 * values, values + 6 * result.numel()))


def dense_8bit(args: Sequence[Any], _: Any, device: str) -> int:
    """Count the dense weight, and two float32 copies of a group of its rows, with which a CPU multiplies 16-bit floats."""
    grad, weight, _scales = args
    group = min(weight.numel(), max(GROUP_VALUES, weight.shape[1]))
    copies = 8 * group if device == "cpu" and grad.dtype.itemsize == 2 else 0
    return int(weight.numel() * grad.dtype.itemsize + copies)


def attention_parts(args: Sequence[Any], _: Any, _device: str) -> int:
    """Count the results of torch's kernels before they are put into rows, chosen rows, and masks of some rows at a time."""
    query, key, value, _mask, _bounds, groups = args[:6]
    chosen = 0 if groups is None else query.nbytes + key.nbytes + value.nbytes
    return int(query.nbytes + chosen + _interval_mask(query, key, args[9:]))


def attention_gradient_parts(args: Sequence[Any], _: Any, _device: str) -> int:
    """Count the same for gradients of query, key and value, and chosen rows of the tensors that the forward kept."""
    grad, query, key, value, _mask, _bounds, groups = args[:7]
    parts = query.nbytes + key.nbytes + value.nbytes
    return int(parts + (0 if groups is None else parts + 2 * grad.nbytes) + _interval_mask(query, key, args[12:]))


def _interval_mask(query: Any, key: Any, others: Sequence[Any]) -> int:
    """Count the mask of the rows that attend at a time, if their intervals differ: bool, and in the query's dtype."""
    lookahead, window = [*others, None, None][:2]
    if lookahead is None and window is None:
        return 0
    rows, keys = min(ROWS, query.shape[2]), key.shape[2]
    seen = keys if window is None else min(keys, window + rows)
    return int(query.shape[0] * rows * seen * (1 + query.dtype.itemsize))


def rolled(args: Sequence[Any], _: Any, _device: str) -> int:
    """Count whole tables of cosines and sines and the query with its halves swapped in float32; for other dtypes also the
    query in float32 and its product by the cosine."""
    query, _key, cos, _sin = args
    return int(query.numel() * (4 if query.dtype == torch.float32 else 12) + 16 * cos.numel())


def promoted(args: Sequence[Any], result: Any, device: str) -> int:
    """Count the operands that a CPU converts to the result's dtype in memory; a GPU does it on the way."""
    if device != "cpu" or not isinstance(result, Tensor) or not result.is_floating_point():
        return 0
    other = (value.numel() for value in args if isinstance(value, Tensor) and value.dtype != result.dtype)
    return sum(other) * result.dtype.itemsize


def float32_sum(args: Sequence[Any], result: Any, _device: str) -> int:
    """Count, for 16-bit floats, the sum and the layer's input in float32."""
    base, values = args[:2]
    return 0 if base.dtype == torch.float32 else int(4 * base.numel() + max(0, 4 * values.numel() - result.nbytes))


def float32_gradients(args: Sequence[Any], _: Any, _device: str) -> int:
    """Count, for 16-bit floats, gradient, input and the input's gradient in float32."""
    grad, values = args[:2]
    return 0 if values.dtype == torch.float32 else int(4 * grad.numel() + 8 * values.numel())

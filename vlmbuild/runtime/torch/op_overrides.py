"""Faster functions of the same values that replace operators in a bound region's graph.

Graphs that Python runs call an operator's kernel directly where no gradient is needed. Compilers get aten's operators, and
for steps of one token per row functions that they trace through and fuse; `targets/aoti/lowering.py` has more for AOTInductor
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmbuild.ops.attention.sdpa import sdpa_forward
from vlmbuild.ops.linear_onednn.op import linear_onednn, suits_onednn
from vlmbuild.ops.rope.op import rotate_cpu, rotate_reference


def _linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer; on a CPU, as matrix times vector for each of a few rows. Inductor turns them into one loop at the
    speed of memory, where BLAS libraries are tuned for more rows."""
    rows = states.flatten(0, -2)
    if states.device.type != "cpu" or len(rows) > _FEW:
        return F.linear(states, weight, bias)
    products = torch.stack([torch.mv(weight, row) for row in rows]).view(*states.shape[:-1], -1)
    return products if bias is None else products + bias


def _rotate(query: Tensor, *rest: Any) -> Any:
    """Rotate; on a CPU by the formula, which inductor fuses."""
    return rotate_reference(query, *rest) if query.device.type == "cpu" else _ROTATE(query, *rest)


def _attention_kernel(query: Tensor, *rest: Any) -> Any:
    return _ATTENTION(query, *rest) if _needs_dispatcher(query) else sdpa_forward(query, *rest)[0]


def _rotation_kernel(query: Tensor, *rest: Any) -> Any:
    return _ROTATE(query, *rest) if _needs_dispatcher(query) else rotate_cpu(query, *rest)


def _linear_kernel(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _needs_dispatcher(states) or not suits_onednn(states, weight):
        return F.linear(states, weight, bias)
    return linear_onednn(states, weight, bias)


def _needs_dispatcher(tensor: Tensor) -> bool:
    """Whether gradients, autocast, another device or a tensor subclass need the dispatcher."""
    return (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or tensor.device.type != "cpu"
        or type(tensor) is not Tensor
    )


_ATTENTION, _ROTATE = torch.ops.vlmbuild.attention_auto.default, torch.ops.vlmbuild.mrope_rotate.default
_LINEAR = torch.ops.aten.linear.default
WITHOUT_GRADIENTS: dict[object, Callable[..., Any]] = {
    _ATTENTION: _attention_kernel,
    _ROTATE: _rotation_kernel,
    _LINEAR: _linear_kernel,
}
"""Overrides for graphs that Python runs. With gradients each calls its operator, so that one graph serves both."""
_FEW = 4
FOR_COMPILERS_OF_ONE_TOKEN: dict[object, Callable[..., Any]] = {_LINEAR: _linear, _ROTATE: _rotate}
"""Overrides for `torch.compile` and AOTInductor."""

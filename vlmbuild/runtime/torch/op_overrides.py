"""Faster functions of the same values that replace operators in a bound region's graph.

Where no gradient is needed, Python runs float32 linear layers by oneDNN. Compilers get aten's operators, and for steps of one
token per row functions that they trace through and fuse; `targets/aoti/lowering.py` has more for AOTInductor alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmbuild.ops.linear import linear_onednn, suits_onednn
from vlmbuild.ops.rope.op import rotate_reference

_ROTATE = torch.ops.vlmbuild.mrope_rotate.default
_LINEAR = torch.ops.aten.linear.default
_FEW = 4
"""Rows that are multiplied one by one, at most."""


def _linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a linear layer; on a CPU a few rows are multiplied one by one. Inductor fuses these products into one loop that
    reads weights at the speed of memory, where BLAS libraries are optimized for more rows."""
    rows = states.flatten(0, -2)
    if states.device.type != "cpu" or len(rows) > _FEW:
        return F.linear(states, weight, bias)
    products = torch.stack([torch.mv(weight, row) for row in rows]).view(*states.shape[:-1], -1)
    return products if bias is None else products + bias


def _rotate(query: Tensor, *rest: Any) -> Any:
    """Rotate query and key; on a CPU by the formula, which inductor fuses."""
    return rotate_reference(query, *rest) if query.device.type == "cpu" else _ROTATE(query, *rest)


def _linear_kernel(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    plain = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or type(states) is not Tensor
    if plain or not suits_onednn(states, weight):
        return F.linear(states, weight, bias)
    return linear_onednn(states, weight, bias)


WITHOUT_GRADIENTS: dict[object, Callable[..., Any]] = {_LINEAR: _linear_kernel}
"""Overrides for graphs that Python runs. With gradients each calls its operator, so that one graph serves both."""

FOR_COMPILERS_OF_ONE_TOKEN: dict[object, Callable[..., Any]] = {_LINEAR: _linear, _ROTATE: _rotate}
"""Overrides for `torch.compile` and AOTInductor."""

"""oneDNN's linear layer in compiled code, with weights that are inputs: inductor's own use of it takes constants
alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.ir import TensorBox
from torch._inductor.lowering import register_lowering
from torch._inductor.mkldnn_ir import LinearUnary

from vlmbuild.ops.linear import suits_onednn

_LINEAR = torch.ops.vlmbuild.linear_onednn.default


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a linear layer, by oneDNN where torch would not take it."""
    result: Tensor = _LINEAR(states, weight, bias) if suits_onednn(states, weight) else F.linear(states, weight, bias)
    return result


@register_lowering(_LINEAR)
def _(states: TensorBox, weight: TensorBox, bias: TensorBox | None) -> TensorBox:
    """Lower the operator to a call from C++."""
    result: TensorBox = TensorBox.create(LinearUnary.create(states, weight, bias, "none", [], ""))
    return result

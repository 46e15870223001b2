"""Kernels that graphs call directly when Python runs them, where going through torch's dispatcher changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmbuild.ops.attention.sdpa import sdpa_forward
from vlmbuild.ops.rope.op import rotate_cpu


def needs_dispatcher(tensor: Tensor) -> bool:
    """Return whether gradients, autocast, another device than the CPU, or a subclass of Tensor need torch's dispatcher."""
    return (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or tensor.device.type != "cpu"
        or type(tensor) is not Tensor
    )


def attention(query: Tensor, *rest: Any) -> Any:
    """Compute `vlmbuild::attention_auto`."""
    if needs_dispatcher(query):
        return torch.ops.vlmbuild.attention_auto.default(query, *rest)
    return sdpa_forward(query, *rest)[0]


def rotate(query: Tensor, *rest: Any) -> Any:
    """Compute `vlmbuild::mrope_rotate`."""
    if needs_dispatcher(query):
        return torch.ops.vlmbuild.mrope_rotate.default(query, *rest)
    return rotate_cpu(query, *rest)

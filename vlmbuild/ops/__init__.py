"""The project's own operators: importing this package registers them with torch, and `OPERATORS` has a row for each.

Each has a schema, shape rules for tensors without data, a plain-torch reference, gradients, and kernels. `linear_packed`,
`embedding_packed` and `linear_onednn` have no gradients: they are for targets that cannot train, and for inference.
"""

from __future__ import annotations

from typing import Any

import torch

import vlmbuild.ops.attention.lowered
import vlmbuild.ops.linear
import vlmbuild.ops.linear_4bit.op
import vlmbuild.ops.linear_8bit.op
import vlmbuild.ops.lora.op
import vlmbuild.ops.rope.op  # noqa: F401
from vlmbuild.ops import workspace
from vlmbuild.ops.operator import Operator

__all__ = ["ATTENTION", "EMBEDDING", "LINEAR", "OPERATORS", "PLAIN_LINEAR", "WORKSPACES", "Operator"]

_ATTENTION_KERNELS = "vlmbuild.ops.attention.triton"
_ROWS = (
    Operator("attention", "attention"),
    Operator("attention_backward", "attention", "backward"),
    Operator("attention_auto", "attention", kernels=_ATTENTION_KERNELS),
    Operator("attention_auto_forward", "attention", "forward", workspace=workspace.attention_parts),
    Operator("attention_auto_backward", "attention", "backward", workspace=workspace.attention_gradient_parts),
    Operator("attention_sdpa", "attention"),
    Operator("attention_sdpa_forward", "attention", "forward", workspace=workspace.attention_parts),
    Operator("attention_sdpa_backward", "attention", "backward", workspace=workspace.attention_gradient_parts),
    Operator("attention_triton", "attention", kernels=_ATTENTION_KERNELS),
    Operator("attention_triton_forward", "attention", "forward"),
    Operator("attention_triton_backward", "attention", "backward"),
    Operator("linear_4bit", "linear", workspace=workspace.dense_4bit),
    Operator("linear_4bit_backward", "linear", "backward", workspace=workspace.dense_4bit),
    Operator("linear_8bit", "linear", workspace=workspace.integers),
    Operator("linear_8bit_backward", "linear", "backward", workspace=workspace.dense_8bit),
    Operator("linear_packed", "linear"),
    Operator("embedding_packed", "embedding"),
    # The runtime and compiled code put it in the place of torch's.
    Operator("linear_onednn", "linear", in_programs=False),
    Operator("lora", "adapter", workspace=workspace.float32_sum),
    Operator("lora_backward", "adapter", "backward", workspace=workspace.float32_gradients),
    Operator("mrope_cos_sin", "rotary"),
    Operator("mrope_rotate", "rotary", workspace=workspace.rolled, kernels="vlmbuild.ops.rope.triton"),
    Operator("mrope_rotate_backward", "rotary", "backward", workspace=workspace.rolled),
    # A function: losses are computed outside of graphs.
    Operator("cross_entropy", "loss", in_programs=False, kernels="vlmbuild.ops.cross_entropy.triton"),
)

OPERATORS: dict[str, Operator] = {row.name: row for row in _ROWS}
"""Name -> operator."""

ATTENTION: frozenset[Any] = frozenset(row.overload for row in _ROWS if row.kind == "attention" and row.part == "whole")
"""The attention operators of graphs; all have the same arguments."""

PLAIN_LINEAR = torch.ops.aten.linear.default
EMBEDDING = torch.ops.aten.embedding.default

LINEAR: frozenset[Any] = frozenset(
    [
        PLAIN_LINEAR,
        *(
            row.overload
            for row in _ROWS
            if row.kind == "linear" and row.part == "whole" and f"{row.name}_backward" in OPERATORS
        ),
    ]
)
"""The linear layers that can train, plain and quantized; the second argument is the weight."""


WORKSPACES: dict[Any, workspace.Workspace] = {
    torch.Tag.pointwise: workspace.promoted,
    **{row.overload: row.workspace for row in _ROWS if row.workspace is not None},
}
"""Formulas by operator, or by a tag that operators have."""

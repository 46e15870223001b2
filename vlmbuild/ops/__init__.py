"""The project's own operators: importing this package registers them with torch.

Each has a schema, shape rules for tensors without data, a plain-torch reference, gradients, and kernels. `linear_packed` and
`linear_onednn` have no gradients: they are for targets that cannot train, and for inference.
"""

from __future__ import annotations

import torch

import vlmbuild.ops.attention.lowered
import vlmbuild.ops.attention.op
import vlmbuild.ops.linear_4bit.op
import vlmbuild.ops.linear_8bit.op
import vlmbuild.ops.linear_onednn.op
import vlmbuild.ops.linear_packed.op
import vlmbuild.ops.lora.op
import vlmbuild.ops.rope.op  # noqa: F401

OPERATORS: tuple[str, ...] = (
    "vlmbuild::attention",
    "vlmbuild::attention_auto",
    "vlmbuild::attention_auto_backward",
    "vlmbuild::attention_auto_forward",
    "vlmbuild::attention_backward",
    "vlmbuild::attention_sdpa",
    "vlmbuild::attention_sdpa_backward",
    "vlmbuild::attention_sdpa_forward",
    "vlmbuild::attention_triton",
    "vlmbuild::attention_triton_backward",
    "vlmbuild::attention_triton_forward",
    "vlmbuild::linear_4bit",
    "vlmbuild::linear_4bit_backward",
    "vlmbuild::linear_8bit",
    "vlmbuild::linear_8bit_backward",
    "vlmbuild::linear_packed",
    "vlmbuild::lora",
    "vlmbuild::lora_backward",
    "vlmbuild::mrope_cos_sin",
    "vlmbuild::mrope_rotate",
    "vlmbuild::mrope_rotate_backward",
)
"""What a loaded graph may call besides torch's own, by qualified name: every registered operator but `linear_onednn`, which
the runtime and compiled code put in the place of torch's."""

ATTENTION = frozenset(
    getattr(torch.ops.vlmbuild, name).default
    for name in ("attention", "attention_auto", "attention_sdpa", "attention_triton")
)
"""The operators that compute attention in a program's graphs."""
PLAIN_LINEAR = torch.ops.aten.linear.default
LINEAR = (PLAIN_LINEAR, torch.ops.vlmbuild.linear_4bit.default, torch.ops.vlmbuild.linear_8bit.default)
"""The operators of trainable linear layers, plain and quantized; the second argument is the weight."""

"""The project's own operators: importing this package registers them with torch.

Each has a schema, shape rules for tensors without data, a plain-torch reference, gradients, and kernels. `linear_packed` and
`linear_onednn` have no gradients: they are for targets that cannot train, and for inference.
"""

from __future__ import annotations

from vlmbuild.ops.attention import lowered as attention_lowered
from vlmbuild.ops.attention import op as attention
from vlmbuild.ops.linear_4bit import op as linear_4bit
from vlmbuild.ops.linear_8bit import op as linear_8bit
from vlmbuild.ops.linear_onednn import op as linear_onednn
from vlmbuild.ops.linear_packed import op as linear_packed
from vlmbuild.ops.lora import op as lora
from vlmbuild.ops.rope import op as mrope

__all__ = [
    "OPERATORS",
    "attention",
    "attention_lowered",
    "linear_4bit",
    "linear_8bit",
    "linear_onednn",
    "linear_packed",
    "lora",
    "mrope",
]

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

"""Replace operators before they are compiled, by operators of torch where these can be fused, or need no Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx import GraphModule

from vlmbuild.errors import PassError
from vlmbuild.ops import OPERATORS
from vlmbuild.ops.attention.op import Masks, allowed_keys
from vlmbuild.ops.rope.op import cos_sin_reference, rotate_reference
from vlmbuild.targets.aoti.onednn import linear

_OPS = torch.ops.vlmbuild


def lower(graph: GraphModule) -> None:
    """Replace operators in place by functions that are traced through."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and (form := _LOWERED.get(node.target)) is not None:
            node.target = form
    graph.recompile()


def _attention(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        key_groups: Tensor | None,
        visible_groups: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Tensor:
        """Attend as the operator does; with a cache on a CPU, by torch's kernel, which C++ calls itself."""
        if query.device.type != "cpu" or key_mask is None or cu_seqlens is not None:
            return operator(query, key, value, key_mask, cu_seqlens, key_groups, visible_groups, causal, scale)
        seen = allowed_keys(query.shape[2], key.shape[2], Masks(key_mask), causal, query.device)
        additive = torch.where(seen, 0.0, float("-inf")).to(query.dtype)
        additive = additive.expand(query.shape[0], 1, query.shape[2], key.shape[2])
        result: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=additive, scale=scale
        )[0]
        return result.transpose(1, 2).contiguous()

    return attend


def _refusal(name: str, remedy: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> NoReturn:
        raise PassError(f"vlmbuild::{name} cannot be compiled ahead of time. {remedy}")

    return refuse


FORMS: dict[str, Callable[..., Any] | None] = {
    "attention": None,
    "attention_auto": _attention(_OPS.attention_auto),
    "attention_sdpa": _attention(_OPS.attention_sdpa),
    "attention_triton": _refusal("attention_triton", "Build with `--attention sdpa` or `--attention auto`."),
    "linear_4bit": None,
    "linear_8bit": None,
    "linear_packed": _refusal("linear_packed", "Its weight is for ONNX Runtime: build with `--quantize nf4`."),
    "lora": _refusal("lora", "Merge the adapter: `vlmbuild build SOURCE --adapter DIR --target aoti`."),
    "mrope_cos_sin": cos_sin_reference,
    "mrope_rotate": rotate_reference,
}
"""Operator of a program -> function that is traced instead of it, or refuses it; None: compiled code calls the
operator."""
_LOWERED = {OPERATORS[name].overload: form for name, form in FORMS.items()} | {torch.ops.aten.linear.default: linear}

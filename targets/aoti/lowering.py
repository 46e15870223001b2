"""What operators become before they are compiled: operators of torch where these can be fused, or need no Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from vlmbuild.ops.attention.op import Masks, allowed_keys
from vlmbuild.ops.rope.op import cos_sin_reference, rotate_reference
from vlmbuild.targets.aoti.onednn import linear

_OPS = torch.ops.vlmbuild
_ATTENTION = ("attention_auto", "attention_sdpa")


def lower(graph: GraphModule) -> None:
    """Replace operators in place by functions that are traced through."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in _LOWERED:
            node.target = _LOWERED[node.target]
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
        """As the operator; with a cache on a CPU, torch's kernel, which C++ calls itself."""
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


_LOWERED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.linear.default: linear,
    _OPS.mrope_rotate.default: rotate_reference,
    _OPS.mrope_cos_sin.default: cos_sin_reference,
    **{getattr(_OPS, name).default: _attention(getattr(_OPS, name)) for name in _ATTENTION},
}

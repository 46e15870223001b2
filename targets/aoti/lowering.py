"""Replace operators before they are compiled, by operators of torch where these can be fused, or need no Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.ir import TensorBox
from torch._inductor.lowering import register_lowering
from torch._inductor.mkldnn_ir import LinearUnary
from torch.fx import GraphModule

from vlmbuild.errors import PassError
from vlmbuild.ops import OPERATORS
from vlmbuild.ops.attention.op import Masks, allowed_keys
from vlmbuild.ops.linear import suits_onednn
from vlmbuild.ops.rope.op import cos_sin_reference, rotate_reference

_OPS = torch.ops.vlmbuild
_LINEAR = torch.ops.aten.linear.default
_FEW_ROWS = 4


def lower(graph: GraphModule, *, one_token: bool = False) -> None:
    """Replace operators in place by functions that are traced through, those of few rows or of any number."""
    forms = _LOWERED | ({_LINEAR: linear_of_few_rows} if one_token else {})
    for node in graph.graph.nodes:
        if node.op == "call_function" and (form := forms.get(node.target)) is not None:
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
        *others: Any,
    ) -> Tensor:
        """Attend as the operator does; with a cache on a CPU, by torch's kernel, which C++ calls itself."""
        masks = Masks(key_mask, cu_seqlens, key_groups, visible_groups, *others)
        if query.device.type != "cpu" or key_mask is None or cu_seqlens is not None:
            return operator(query, key, value, *masks[:4], causal, scale, *others)
        seen = allowed_keys(query.shape[2], key.shape[2], masks, causal, query.device)
        additive = torch.where(seen, 0.0, float("-inf")).to(query.dtype)
        additive = additive.expand(query.shape[0], 1, query.shape[2], key.shape[2])
        result: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=additive, scale=scale
        )[0]
        return result.transpose(1, 2).contiguous()

    return attend


def linear_of_few_rows(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a linear layer; on a CPU a few rows are multiplied one by one. Inductor fuses these products into one loop that
    reads weights at the speed of memory, where BLAS libraries are optimized for more rows."""
    rows = states.flatten(0, -2)
    if states.device.type != "cpu" or len(rows) > _FEW_ROWS:
        return F.linear(states, weight, bias)
    products = torch.stack([torch.mv(weight, row) for row in rows]).view(*states.shape[:-1], -1)
    return products if bias is None else products + bias


def _linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a linear layer, by oneDNN where torch would not take it."""
    result: Tensor = (
        _OPS.linear_onednn.default(states, weight, bias)
        if suits_onednn(states, weight)
        else F.linear(states, weight, bias)
    )
    return result


@register_lowering(_OPS.linear_onednn.default)
def _(states: TensorBox, weight: TensorBox, bias: TensorBox | None) -> TensorBox:
    """Let C++ call oneDNN with weights that are inputs: inductor's own use of it takes constants alone."""
    result: TensorBox = TensorBox.create(LinearUnary.create(states, weight, bias, "none", [], ""))
    return result


def _refusal(name: str, remedy: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> NoReturn:
        raise PassError(f"vlmbuild::{name} cannot be compiled ahead of time. {remedy}")

    return refuse


FORMS: dict[str, Callable[..., Any] | None] = {
    "attention": None,
    "attention_auto": _attention(_OPS.attention_auto),
    "attention_sdpa": _attention(_OPS.attention_sdpa),
    "attention_triton": _refusal("attention_triton", "Build with `--attention sdpa` or `--attention auto`."),
    "embedding_packed": _refusal("embedding_packed", "Its weight is for ONNX Runtime: leave the role embedding out."),
    "linear_4bit": None,
    "linear_8bit": None,
    "linear_packed": _refusal("linear_packed", "Its weight is for ONNX Runtime: build with `--quantize nf4`."),
    "lora": _refusal("lora", "Merge the adapter: `vlmbuild build SOURCE --adapter DIR --target aoti`."),
    "mrope_cos_sin": cos_sin_reference,
    "mrope_rotate": rotate_reference,
}
"""Operator of a program -> function that is traced instead of it, or refuses it; None: compiled code calls the
operator."""
_LOWERED = {OPERATORS[name].overload: form for name, form in FORMS.items()} | {_LINEAR: _linear}

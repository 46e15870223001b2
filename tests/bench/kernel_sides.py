"""Attention, rotation and normalization as they are measured: our call, the same from other code, and peers on the same inputs."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmbuild.ops.attention.triton import attention_backward_triton, attention_forward_triton
from vlmbuild.ops.rope.op import rotate_reference
from vlmbuild.ops.rope.triton import rotate_triton

Run = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """Where kernels run.

    Attributes:
        device: "cuda", or "cpu" for Triton's interpreter.
        dtype: Of activations. The interpreter cannot multiply bfloat16.
    """

    device: str
    dtype: torch.dtype

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values."""
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def compiled(self, function: Run, **options: Any) -> Any:
        """Under `torch.compile`; in the interpreter through its front end alone, which is what a mistake would stop."""
        return torch.compile(function, backend="inductor" if self.device == "cuda" else "eager", **options)


@dataclass(frozen=True)
class Sides:
    """A kernel on its inputs.

    Attributes:
        run: The kernel; returns a tensor or several.
        exact: The same from other code, which it must agree with.
        peers: Name -> the same by someone else.
    """

    run: Run
    exact: Run
    peers: dict[str, Run] = field(default_factory=dict)


def attention(
    setting: Setting, length: int, heads: tuple[int, int], dim: int, causal: bool, segments: int
) -> dict[str, Sides]:
    """Forward and backward, of query heads on key heads; torch's kernels, segment by segment, are the exact side."""
    query, key, value = (setting.draw(1, length, many, dim).transpose(1, 2) for many in (heads[0], heads[1], heads[1]))
    bounds = torch.arange(segments + 1, device=setting.device, dtype=torch.int32) * (length // segments)
    rest = (None, bounds, None, None, causal, 1 / math.sqrt(dim))
    out, logsumexp = attention_forward_triton(query, key, value, *rest)
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    peers = _attention_peers(setting, leaves, bounds, causal)
    exact = lambda: torch.ops.vlmbuild.attention_sdpa(*leaves, *rest).transpose(1, 2)  # noqa: E731
    grad = setting.draw(1, length, heads[0], dim)

    def gradients(call: Run) -> Run:
        result = cache(call)  # when it is first asked for: a peer may not run here
        return lambda: torch.autograd.grad(result(), leaves, grad.transpose(1, 2), retain_graph=True)

    with_gradients = {name: call for name, call in peers.items() if setting.device == "cuda" or name != "flex"}
    kept = (out, logsumexp, *rest[-2:])
    return {
        "forward": Sides(
            lambda: attention_forward_triton(query, key, value, *rest)[0].transpose(1, 2),
            torch.no_grad()(exact),
            {name: torch.no_grad()(call) for name, call in peers.items()},
        ),
        "backward": Sides(
            lambda: attention_backward_triton(grad, query, key, value, *rest[:-2], *kept),
            gradients(exact),
            {name: gradients(call) for name, call in with_gradients.items()},
        ),
    }


def _attention_peers(setting: Setting, leaves: list[Tensor], bounds: Tensor, causal: bool) -> dict[str, Run]:
    """torch's fused attention where there is one segment, and FlexAttention with a document mask (without gradients on a CPU)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value = leaves
    length = query.shape[2]
    segment = torch.bucketize(torch.arange(length, device=setting.device), bounds[1:], right=True)

    def seen(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = segment[i] == segment[j]
        return same & (i >= j) if causal else same

    blocks = create_block_mask(seen, None, None, length, length, device=setting.device)
    compiled = setting.compiled(flex_attention, dynamic=False)
    inputs = leaves if setting.device == "cuda" else [leaf.detach() for leaf in leaves]
    peers: dict[str, Run] = {"flex": lambda: compiled(*inputs, block_mask=blocks, enable_gqa=True)}
    if len(bounds) == 2:
        peers["sdpa"] = lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    return peers


def one_row(setting: Setting, keys: int, heads: tuple[int, int], dim: int) -> Sides:
    """A step of generation on a cache."""
    query, scale = setting.draw(1, heads[0], 1, dim), 1 / math.sqrt(dim)
    key, value = setting.draw(2, 1, heads[1], keys, dim).unbind(0)
    sdpa = lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True)  # noqa: E731
    return Sides(
        lambda: attention_forward_triton(query, key, value, None, None, None, None, True, scale)[0].transpose(1, 2),
        sdpa,
        {"sdpa": sdpa},
    )


def rotation(setting: Setting, rows: int, heads: tuple[int, int], dim: int) -> dict[str, Sides]:
    """Forward and backward, of query and key as projections leave them."""
    query, key, *grads = (setting.draw(1, rows, many, dim).transpose(1, 2) for many in (*heads, *heads))
    angle = setting.draw(1, rows, dim // 2, dtype=torch.float32)
    cos, sin = angle.cos(), angle.sin()
    full = [torch.cat((x, x), -1).to(setting.dtype) for x in (cos, sin)]

    def forward(call: Callable[..., Any]) -> Run:
        own = query.clone(), key.clone()  # Liger's kernel writes into its inputs
        return lambda: call(*own, *full)

    def backward(call: Callable[..., Any]) -> Run:
        leaves, own = ([x.detach().clone() for x in pair] for pair in ((query, key), grads))
        results = cache(lambda: call(*(leaf.requires_grad_() for leaf in leaves), *full))
        return lambda: torch.autograd.grad(results(), leaves, own, retain_graph=True)

    return {
        "forward": Sides(
            lambda: rotate_triton(query, key, cos, sin),
            lambda: rotate_reference(query, key, cos, sin),
            {name: forward(call) for name, call in _rotations().items()},
        ),
        "backward": Sides(
            lambda: rotate_triton(*grads, cos, sin, back=True),
            lambda: rotate_reference(*grads, cos, -sin),
            {name: backward(call) for name, call in _rotations().items()},
        ),
    }


def _rotations() -> dict[str, Callable[..., Any]]:
    """Of query, key, cosines and sines of whole heads."""
    calls: dict[str, Callable[..., Any]] = {}
    if importlib.util.find_spec("transformers"):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        calls["transformers eager"] = apply_rotary_pos_emb
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.rope import LigerRopeFunction

        calls["liger"] = LigerRopeFunction.apply
    return calls


def residual_norm(setting: Setting, rows: int, width: int) -> Sides:
    """A sum and its RMS normalization: there is no kernel of ours, and this says whether inductor leaves room for one."""
    x, residual, weight = setting.draw(rows, width), setting.draw(rows, width), setting.draw(width)

    def plain() -> tuple[Tensor, Tensor]:
        total = x + residual
        wide = total.float()
        return total, weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(setting.dtype)

    return Sides(setting.compiled(plain), plain, {"torch": plain})

"""Attention beside torch's varlen_attn, scaled_dot_product_attention and FlexAttention, on shapes of Qwen2-VL-7B."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.measure.record import MissingError, Record, Row, Run, Setting, compare, publish

LIMIT = 1e-2
"""Relative error of 16-bit results."""


class Shape(NamedTuple):
    """Segments of one packed row."""

    name: str
    length: int
    segments: int
    heads: int
    key_heads: int
    dim: int
    causal: bool


SHAPES = (
    Shape("text, one sample", 4096, 1, 28, 4, 128, True),
    Shape("text, packed", 8192, 8, 28, 4, 128, True),
    Shape("vision, 8 images", 8192, 8, 16, 16, 80, False),
    Shape("vision, one large image", 4096, 1, 16, 16, 80, False),
)
SMALL = (Shape("text, packed", 32, 2, 2, 1, 80, True),)


def run(record: Record, setting: Setting) -> None:
    """Time both directions of every shape; tiles.json gets the worst ratio."""
    for shape in SMALL if setting.small else SHAPES:
        problem = _Problem(setting, shape)
        for part in ("forward", "backward"):
            with record.row(f"{part}: {shape.name}", **shape._asdict()) as row:
                problem.measure(part, row)
    publish(record, setting, "attention", ("forward", "backward"))


class _Problem:
    """Inputs of a shape, and the calls on them."""

    def __init__(self, setting: Setting, shape: Shape) -> None:
        self.setting, self.shape = setting, shape
        sizes = (shape.heads, shape.key_heads, shape.key_heads)
        self.leaves = [setting.draw(1, shape.length, heads, shape.dim).transpose(1, 2) for heads in sizes]
        self.leaves = [leaf.requires_grad_() for leaf in self.leaves]
        self.grad = setting.draw(1, shape.length, shape.heads, shape.dim)
        self.step = shape.length // shape.segments
        self.bounds = torch.arange(shape.segments + 1, device=setting.device, dtype=torch.int32) * self.step

    def measure(self, part: str, row: Row) -> None:
        from vlmbuild.ops.attention.op import Masks
        from vlmbuild.ops.attention.triton import attention_backward_triton, attention_forward_triton

        query, key, value = (leaf.detach() for leaf in self.leaves)
        masks = Masks(cu_seqlens=self.bounds)
        options = (self.shape.causal, 1 / math.sqrt(self.shape.dim))
        exact, peers = self._exact, dict(self._peers())
        if part == "forward":
            ours: Run = lambda: attention_forward_triton(query, key, value, masks, *options)[0]  # noqa: E731
            calls = {name: torch.no_grad()(call) for name, call in peers.items()}
            compare(self.setting, row, ours, lambda: exact()[0], calls, LIMIT)
        else:
            out, logsumexp = attention_forward_triton(query, key, value, masks, *options)
            kept = (out, logsumexp, *options)
            ours = lambda: attention_backward_triton(self.grad, query, key, value, masks, *kept)  # noqa: E731
            calls = {name: self._gradients(call) for name, call in peers.items()}
            compare(self.setting, row, ours, lambda: exact()[1], calls, LIMIT)
        flops = 4 * self.shape.length * self.step * self.shape.heads * self.shape.dim / (2 if self.shape.causal else 1)
        row["tflops"] = flops * (1 if part == "forward" else 2.5) / row["ms"] / 1e9

    def _gradients(self, call: Run) -> Run:
        result = cache(call)
        return lambda: torch.autograd.grad(result(), self.leaves, self.grad, retain_graph=True)

    def _exact(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Result and gradients in float32 (whose products are exact enough here), segment by segment."""
        wide = [leaf.detach().float().requires_grad_() for leaf in self.leaves]
        pieces = zip(*(x.split(self.step, dim=2) for x in wide), strict=True)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = torch.cat([self._sdpa(*piece) for piece in pieces], dim=2).transpose(1, 2)
        return out, torch.autograd.grad(out, wide, self.grad.float())

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        causal = self.shape.causal
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    def _peers(self) -> Iterator[tuple[str, Run]]:
        yield "torch varlen_attn", self._varlen
        query, key, value = (x.unflatten(2, (self.shape.segments, -1)).squeeze(0) for x in self.leaves)
        batch = [x.transpose(0, 1) for x in (query, key, value)]  # equal segments are a batch
        yield "torch SDPA, a batch of equal segments", lambda: self._sdpa(*batch).transpose(1, 2).flatten(0, 1)[None]
        yield "torch FlexAttention", self._flex()

    def _varlen(self) -> Tensor:
        if self.setting.small:
            raise MissingError("varlen_attn runs on GPUs only")
        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters
        query, key, value = (x.transpose(1, 2)[0] for x in self.leaves)
        options: dict[str, Any] = {}
        if self.shape.causal:
            options |= {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
        if self.shape.heads != self.shape.key_heads:
            if "enable_gqa" in known:
                options["enable_gqa"] = True
            else:
                key, value = (x.repeat_interleave(self.shape.heads // self.shape.key_heads, 1) for x in (key, value))
        out = varlen_attn(query, key, value, self.bounds, self.bounds, self.step, self.step, **options)
        return out[None]  # type: ignore[index,no-any-return]

    def _flex(self) -> Run:
        """Compiled when first called."""
        if self.setting.small:
            return _missing("FlexAttention has no gradients on a CPU")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        step, causal, length = self.step, self.shape.causal, self.shape.length

        def visible(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            same = i // step == j // step
            return same & (i >= j) if causal else same

        compiled = torch.compile(flex_attention, dynamic=False)
        mask = cache(lambda: create_block_mask(visible, None, None, length, length, device=self.setting.device))
        return lambda: compiled(*self.leaves, block_mask=mask(), enable_gqa=True).transpose(1, 2)


def _missing(reason: str) -> Callable[[], Any]:
    def call() -> Any:
        raise MissingError(reason)

    return call

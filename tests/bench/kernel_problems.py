"""What is measured of each kernel on a GPU: the call, its peers, its limit, and what it must agree with.

Sizes are those of published models: Qwen2-VL-2B's and 7B's attention and layers, Llama 3.2 Vision's image rows.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench.kernel_limits import Architecture
from vlmbuild.ops.attention_triton import attention_backward_triton, attention_forward_triton
from vlmbuild.ops.cross_entropy_triton import cross_entropy_triton
from vlmbuild.ops.linear_4bit import dequantize_4bit
from vlmbuild.ops.linear_4bit_triton import dequantize_4bit_triton, grad_input_triton, linear_4bit_triton
from vlmbuild.ops.linear_8bit import dequantize_8bit
from vlmbuild.ops.linear_8bit_triton import grad_input_8bit_triton, linear_8bit_triton
from vlmbuild.ops.linear_paths import ROW_SIDES
from vlmbuild.ops.lora import lora_reference
from vlmbuild.ops.lora_triton import lora_backward_triton, lora_triton
from vlmbuild.ops.mrope import rotate_reference
from vlmbuild.ops.mrope_triton import rotate_triton

HALF = torch.bfloat16
Run = Callable[[], Any]


@dataclass(frozen=True)
class Problem:
    """A kernel on one size.

    Attributes:
        name: What and how large.
        flops, moved: What the result needs at least: FLOPs on tensor cores, bytes of memory.
        run: The kernel; returns a tensor or several.
        exact: The same from other code, for a check of agreement.
        peers: Name -> the same by someone else.
    """

    name: str
    flops: float
    moved: float
    run: Run
    exact: Run
    peers: dict[str, Run] = field(default_factory=dict)

    def limit(self, chip: Architecture) -> float:
        """Seconds that the chip needs at least."""
        return max(self.flops / chip.tensor, self.moved / chip.bandwidth)


def problems() -> Iterator[Problem]:
    """All of them, one after the other, so that memory is let go in between."""
    for dim, heads, kv_heads in ((64, 16, 16), (80, 16, 16), (96, 16, 16), (128, 12, 2), (128, 28, 4)):
        for length in (1024, 4096, 16384):
            for causal in (False, True):
                yield from _attention(length, dim, heads, kv_heads, causal, segments=1)
        yield from _attention(4096, dim, heads, kv_heads, False, segments=4)
    for rows in (1024, 4096, 16384):
        yield _rotation(rows, 12, 2, 128)
        yield _rotation(rows, 16, 16, 80)
    for wide, narrow in ((1536, 1536), (8960, 1536), (1536, 8960), (18944, 3584)):
        for rows in (1, *ROW_SIDES, 512, 2048):
            yield from _linear(rows, wide, narrow)
            yield from _linear_8bit(rows, wide, narrow)
    for rows in (256, 2048):
        for rank in (16, 64):
            yield from _lora(rows, 18944, 3584, rank)
    for keys in (1024, 8192, 65536):
        yield _one_row(keys, 28, 4, 128)
    yield _loss(256, 151936)
    yield _loss(1024, 128256)


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=HALF)


def _attention(length: int, dim: int, heads: int, kv_heads: int, causal: bool, segments: int) -> Iterator[Problem]:
    query, key, value = (_draw(1, length, many, dim).transpose(1, 2) for many in (heads, kv_heads, kv_heads))
    bounds = torch.arange(segments + 1, device="cuda", dtype=torch.int32) * (length // segments)
    scale = 1 / math.sqrt(dim)
    grad = _draw(1, length, heads, dim)
    arguments = (query, key, value, None, bounds, None, None, causal, scale)
    out, logsumexp = attention_forward_triton(*arguments)
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    flops = 4 * length * (length // segments) * heads * dim / (2 if causal else 1)
    moved = 2 * length * dim * 2 * (heads + kv_heads)
    peers = _attention_peers(leaves, bounds, causal, scale)
    name = f"attention {length} x {heads}/{kv_heads} x {dim}{' causal' if causal else ''}, {segments} segments"
    dense = peers.get("sdpa", next(iter(peers.values()), None)) or (lambda: attention_forward_triton(*arguments)[0])
    yield Problem(
        f"{name}, forward", flops, moved, lambda: attention_forward_triton(*arguments)[0].transpose(1, 2), dense,
        {peer: torch.no_grad()(call) for peer, call in peers.items()},
    )  # fmt: skip
    graphs = {peer: call() for peer, call in peers.items()}
    backward = {
        peer: lambda result=result: torch.autograd.grad(result, leaves, grad.transpose(1, 2), retain_graph=True)
        for peer, result in graphs.items()
    }
    rest = (query, key, value, None, bounds, None, None, out, logsumexp, causal, scale)
    yield Problem(
        f"{name}, backward", 2.5 * flops, 2 * moved, lambda: attention_backward_triton(grad, *rest),
        next(iter(backward.values()), lambda: attention_backward_triton(grad, *rest)), backward,
    )  # fmt: skip


def _attention_peers(leaves: list[Tensor], bounds: Tensor, causal: bool, scale: float) -> dict[str, Run]:
    """torch's fused attention where there is one segment, and FlexAttention with a document mask."""
    query, key, value = leaves
    peers: dict[str, Run] = {}
    if len(bounds) == 2:
        peers["sdpa"] = lambda: F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scale, enable_gqa=True
        )
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        segment = torch.bucketize(torch.arange(query.shape[2], device="cuda"), bounds[1:], right=True)

        def seen(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            same = segment[i] == segment[j]
            return same & (i >= j) if causal else same

        blocks = create_block_mask(seen, None, None, query.shape[2], query.shape[2], device="cuda")
        compiled = torch.compile(flex_attention, dynamic=False)
        peers["flex"] = lambda: compiled(query, key, value, block_mask=blocks, scale=scale, enable_gqa=True)
        peers["flex"]()
    except Exception as error:  # a peer that does not run here is said to be missing, and stops nothing
        print(f"no FlexAttention: {type(error).__name__}: {str(error)[:80]}")
        peers.pop("flex", None)
    return peers


def _rotation(rows: int, heads: int, kv_heads: int, dim: int) -> Problem:
    query, key = (_draw(1, rows, many, dim).transpose(1, 2) for many in (heads, kv_heads))
    angle = torch.randn(1, rows, dim // 2, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    moved = 2 * rows * (heads + kv_heads) * dim * 2 + 2 * 4 * rows * dim // 2
    full_cos, full_sin = (torch.cat((x, x), -1).to(HALF) for x in (cos, sin))
    peers: dict[str, Run] = {}
    if importlib.util.find_spec("transformers"):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        peers["transformers eager"] = lambda: apply_rotary_pos_emb(query, key, full_cos, full_sin)
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.rope import LigerRopeFunction

        peers["liger"] = lambda: LigerRopeFunction.apply(query, key, full_cos, full_sin)
    return Problem(
        f"rotation {rows} x {heads}/{kv_heads} x {dim}", 0, moved, lambda: rotate_triton(query, key, cos, sin),
        lambda: rotate_reference(query, key, cos, sin), peers,
    )  # fmt: skip


def _linear(rows: int, wide: int, narrow: int) -> Iterator[Problem]:
    from bitsandbytes import functional, matmul_4bit

    dense = _draw(wide, narrow) / math.sqrt(narrow)
    packed, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4", compress_statistics=True)
    buffers = (packed, state.absmax, state.state2.absmax, state.offset)
    geometry = (narrow, wide, 64, "nf4", HALF)
    weight = dequantize_4bit(*buffers, *geometry)
    x, grad = _draw(rows, narrow), _draw(rows, wide)
    stored = wide * narrow * 0.516
    activations = 2 * rows * (wide + narrow)
    flops = 2 * rows * wide * narrow
    yield Problem(
        f"nf4 linear {rows} x {narrow} to {wide}", flops, stored + activations,
        lambda: linear_4bit_triton(x, buffers, None, geometry), lambda: F.linear(x, weight),
        {"bitsandbytes": lambda: matmul_4bit(x, packed.t(), state), "bfloat16 weight": lambda: F.linear(x, weight)},
    )  # fmt: skip
    yield Problem(
        f"nf4 linear {rows} x {narrow} to {wide}, input gradient", flops, stored + activations,
        lambda: grad_input_triton(grad, buffers, geometry), lambda: grad @ weight,
        {
            "dequantize, then multiply": lambda: grad @ dequantize_4bit_triton(buffers, geometry),
            "bfloat16 weight": lambda: grad @ weight,
        },
    )  # fmt: skip


def _linear_8bit(rows: int, wide: int, narrow: int) -> Iterator[Problem]:
    from bitsandbytes import MatmulLtState, matmul

    dense = _draw(wide, narrow).float() / math.sqrt(narrow)
    scales = dense.abs().amax(1)
    weight = torch.round(dense * (127 / scales)[:, None]).to(torch.int8)
    state = MatmulLtState(CB=weight, SCB=scales, threshold=6.0, has_fp16_weights=False)
    x, grad = _draw(rows, narrow), _draw(rows, wide)
    x[0, ::1000] = 20.0
    dense = dequantize_8bit(weight, scales, HALF)
    activations, flops = 2 * rows * (wide + narrow), 2 * rows * wide * narrow
    half_as_long = 0.5  # tensor cores multiply integers twice as fast as bfloat16
    yield Problem(
        f"int8 linear {rows} x {narrow} to {wide}", half_as_long * flops, wide * narrow + activations,
        lambda: linear_8bit_triton(x, weight, scales, None, 6.0), lambda: F.linear(x, dense),
        {"bitsandbytes": lambda: matmul(x, weight, state=state, threshold=6.0), "bfloat16 weight": lambda: F.linear(x, dense)},
    )  # fmt: skip
    yield Problem(
        f"int8 linear {rows} x {narrow} to {wide}, input gradient", flops, wide * narrow + activations,
        lambda: grad_input_8bit_triton(grad, weight, scales), lambda: grad @ dense,
        {
            "dequantize, then multiply": lambda: grad @ dequantize_8bit(weight, scales, HALF),
            "bfloat16 weight": lambda: grad @ dense,
        },
    )  # fmt: skip


def _lora(rows: int, wide: int, narrow: int, rank: int) -> Iterator[Problem]:
    base, x, grad = _draw(rows, wide), _draw(rows, narrow), _draw(rows, wide)
    down, up = (torch.randn(shape, device="cuda") / 60 for shape in ((rank, narrow), (wide, rank)))
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (base, x, down, up)]
    plain = lambda: lora_reference(*leaves, 0.5)  # noqa: E731
    once = 2 * rows * (wide + narrow) + 4 * rank * (wide + narrow)
    yield Problem(
        f"lora {rows} x {narrow} to {wide}, rank {rank}", 0, once + 2 * rows * wide,
        lambda: lora_triton(base, x, down, up, 0.5), plain, {"torch": plain, "torch compiled": torch.compile(plain)},
    )  # fmt: skip
    result = plain()
    backward = lambda: torch.autograd.grad(result, leaves[1:], grad, retain_graph=True)  # noqa: E731
    yield Problem(
        f"lora {rows} x {narrow} to {wide}, rank {rank}, gradients", 0, 2 * once,
        lambda: lora_backward_triton(grad, x, down, up, 0.5), backward, {"torch": backward},
    )  # fmt: skip


def _one_row(keys: int, heads: int, kv_heads: int, dim: int) -> Problem:
    query, scale = _draw(1, heads, 1, dim), 1 / math.sqrt(dim)
    key, value = _draw(2, 1, kv_heads, keys, dim).unbind(0)
    sdpa = lambda: F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)  # noqa: E731
    return Problem(
        f"attention of one row on {keys} keys x {heads}/{kv_heads} x {dim}", 4 * keys * heads * dim,
        2 * 2 * keys * kv_heads * dim,
        lambda: attention_forward_triton(query, key, value, None, None, None, None, True, scale)[0].transpose(1, 2),
        sdpa, {"sdpa": sdpa},
    )  # fmt: skip


def _loss(rows: int, vocabulary: int) -> Problem:
    logits = _draw(rows, vocabulary).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device="cuda")

    def torchs() -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(logits.float(), targets, reduction="none")
        return loss, torch.autograd.grad(loss.sum(), logits)[0]

    return Problem(
        f"cross-entropy {rows} x {vocabulary}, with gradient", 0, 2 * 2 * rows * vocabulary,
        lambda: cross_entropy_triton(logits.detach(), targets, with_gradient=True), torchs,
        {"torch": torchs, "torch compiled": torch.compile(torchs)},
    )  # fmt: skip

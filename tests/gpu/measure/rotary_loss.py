"""The rotation, and a head with its cross-entropy, beside transformers and Liger."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.measure.record import MissingError, Record, Run, Setting, compare, publish

ROTATIONS = ((4096, 28, 4, 128), (16384, 28, 4, 128), (8192, 16, 16, 80))
"""Rows, query heads, key heads, head dimension."""
LOSSES = ((4096, 3584, 152064), (2048, 1536, 151936))
"""Rows, width, vocabulary."""
ROTATION_LIMIT, LOSS_LIMIT = 1e-2, 2e-2


def run(record: Record, setting: Setting) -> None:
    """Time the forward and backward rotation, then loss and gradients of a head with their memory."""
    for rows, heads, key_heads, dim in ((9, 4, 2, 16),) if setting.small else ROTATIONS:
        for part in ("forward", "backward"):
            name = f"rotation {part}: {rows} rows, {heads}/{key_heads} heads of {dim}"
            with record.row(name) as row:
                ours, exact, peers = _rotation(setting, part, rows, (heads, key_heads), dim)
                compare(setting, row, ours, exact, peers, ROTATION_LIMIT)
    from vlmbuild.ops import tiles

    tiles.is_measured = lambda _kernel, _capability: True  # in this process: the kernel itself is measured
    for sizes in ((6, 16, 70),) if setting.small else LOSSES:
        with record.row(f"linear and cross-entropy: {sizes[0]} rows, {sizes[1]} wide, {sizes[2]} tokens") as row:
            ours, exact, peers = _loss(setting, *sizes)
            compare(setting, row, ours, exact, peers, LOSS_LIMIT)
            row["peak_bytes"] = {name: _peak(setting, call) for name, call in {"vlmbuild": ours, **peers}.items()}
    publish(record, setting, "rope", ("rotation",))
    publish(record, setting, "cross_entropy", ("linear and cross-entropy",))


def _rotation(setting: Setting, part: str, rows: int, heads: tuple[int, int], dim: int) -> tuple[Run, Run, Any]:
    from vlmbuild.ops.rope.triton import rotate_triton

    tensors = [setting.draw(1, rows, many, dim).transpose(1, 2) for many in heads]
    angle = setting.draw(1, rows, dim // 2, dtype=torch.float32)
    cos, sin = angle.cos(), angle.sin()
    full = [torch.cat((x, x), -1).to(setting.dtype) for x in (cos, sin)]
    back = part == "backward"

    def exact() -> tuple[Tensor, ...]:
        c, s = (x.double().unsqueeze(1) for x in (cos, -sin if back else sin))
        halves = [x.double().chunk(2, -1) for x in tensors]
        return tuple(torch.cat((a * c - b * s, b * c + a * s), -1) for a, b in halves)

    def peer(call: Callable[..., Any]) -> Run:
        leaves = [x.detach().clone() for x in tensors]  # Liger writes into its inputs
        if not back:
            return lambda: call(*leaves, *full)
        results = cache(lambda: call(*(leaf.requires_grad_() for leaf in leaves), *full))
        grads = [x.detach().clone() for x in tensors]
        return lambda: torch.autograd.grad(results(), leaves, grads, retain_graph=True)

    return (
        lambda: rotate_triton(*tensors, cos, sin, back=back),
        exact,
        {name: peer(call) for name, call in _rotations()},
    )


def _rotations() -> Iterator[tuple[str, Callable[..., Any]]]:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    yield "transformers", apply_rotary_pos_emb
    yield "Liger", _liger("liger_kernel.ops.rope", "LigerRopeFunction")


def _liger(module: str, name: str) -> Callable[..., Any]:
    """Apply one of Liger's functions; import it when it is called, since it may be missing."""

    def call(*arguments: Any) -> Any:
        if importlib.util.find_spec("liger_kernel") and not torch.cuda.is_available():
            raise MissingError("Liger's kernels run on GPUs only")
        return getattr(importlib.import_module(module), name).apply(*arguments)

    return call


def _loss(setting: Setting, rows: int, width: int, vocabulary: int) -> tuple[Run, Run, dict[str, Run]]:
    from vlmbuild.runtime.torch.loss import summed_cross_entropy

    states = setting.draw(rows, width).requires_grad_()
    weight = (setting.draw(vocabulary, width) / math.sqrt(width)).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=setting.device)

    def with_gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return (loss.detach(), *torch.autograd.grad(loss, (states, weight)))

    def ours() -> tuple[Tensor, ...]:
        head = lambda tensors, inputs: F.linear(inputs, tensors[0])  # noqa: E731
        return with_gradients(summed_cross_entropy(head, (weight,), states, targets, vocabulary))

    def transformers() -> tuple[Tensor, ...]:
        """Compute what its ForCausalLMLoss does."""
        return with_gradients(F.cross_entropy(F.linear(states, weight).float(), targets, reduction="sum"))

    def exact() -> tuple[Tensor, ...]:
        wide = [x.detach().float().requires_grad_() for x in (states, weight)]
        loss = F.cross_entropy(F.linear(*wide), targets, reduction="sum")
        return (loss.detach(), *torch.autograd.grad(loss, wide))

    def liger() -> tuple[Tensor, ...]:
        if setting.small and importlib.util.find_spec("liger_kernel"):
            raise MissingError("Liger's kernels run on GPUs only")
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return with_gradients(LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, states, targets))

    return ours, exact, {"transformers": transformers, "Liger": liger}


def _peak(setting: Setting, call: Run) -> int | None:
    """Return the peak in bytes above the start."""
    if setting.small:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        call()
    except Exception:  # its time says why
        return None
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before

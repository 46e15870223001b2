"""A linear layer's result plus its low-rank adapter (LoRA, arXiv:2106.09685, section 4.1).

One operator, so that autograd keeps only the layer's input, in its own dtype, and sums are rounded once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.util.dtypes import FLOATS


def lora_reference(base: Tensor, input: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Compute `base + scaling * (input @ down.T) @ up.T` in float32 and cast it to the dtype of `base`; plain torch."""
    low = input.float() @ down.float().T
    return (base.float() + scaling * (low @ up.float().T)).to(base.dtype)


def _check(base: Tensor, input: Tensor, down: Tensor, up: Tensor) -> None:
    features = (input.shape[-1], base.shape[-1])
    shapes = ((down.shape[0], features[0]), (features[1], down.shape[0]))
    if (tuple(down.shape), tuple(up.shape)) != shapes or base.shape[:-1] != input.shape[:-1]:
        raise UsageError(
            f"lora: base {tuple(base.shape)}, input {tuple(input.shape)}, down {tuple(down.shape)}, up {tuple(up.shape)}; "
            "pass [..., out], [..., in], [r, in], [out, r]"
        )
    if down.dtype != up.dtype or {base.dtype, input.dtype, down.dtype} - set(FLOATS):
        raise UsageError(
            f"lora: {base.dtype}, {input.dtype}, {down.dtype}, {up.dtype}; pass floats of 16 or 32 bits, "
            "the same for both matrices"
        )


def _no_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Keep products in float32 under a caller's autocast."""
    guard: AbstractContextManager[None] = torch.autocast(tensor.device.type, enabled=False)
    return guard


@torch.library.custom_op(
    "vlmbuild::lora",
    mutates_args=(),
    schema="(Tensor base, Tensor input, Tensor down, Tensor up, float scaling) -> Tensor",
)
def lora(base: Tensor, input: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Compute `lora_reference`: `[..., out]` from base `[..., out]`, input `[..., in]`, down `[r, in]` and up `[out, r]`.

    Differentiable in all tensors. The products are in float32, also under autocast. Matrices are float32; FSDP2's mixed
    precision passes them in a smaller dtype.

    Raises:
        UsageError: Shapes or dtypes do not fit.
    """
    _check(base, input, down, up)
    total = base.reshape(-1, base.shape[-1]).to(torch.float32, copy=True)
    with _no_autocast(base):
        low = input.reshape(-1, input.shape[-1]).float() @ down.float().T
        total.addmm_(low, up.float().T, alpha=scaling)
    return total.to(base.dtype).view(base.shape)


@lora.register_fake
def _(base: Tensor, input: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    _check(base, input, down, up)
    return torch.empty_like(base, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "vlmbuild::lora_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor input, Tensor down, Tensor up, float scaling) -> (Tensor, Tensor, Tensor)",
)
def lora_backward(
    grad: Tensor, input: Tensor, down: Tensor, up: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `lora` for input, down and up. The one for the base is `grad` itself."""
    wide = input.reshape(-1, input.shape[-1]).float()
    grad_result = grad.reshape(-1, grad.shape[-1]).float()
    with _no_autocast(grad):
        low = wide @ down.float().T
        grad_low = (grad_result @ up.float()).mul_(scaling)
        return (
            (grad_low @ down.float()).to(input.dtype).view(input.shape),
            (grad_low.T @ wide).to(down.dtype),
            (grad_result.T @ low).mul_(scaling).to(up.dtype),
        )


@lora_backward.register_fake
def _(grad: Tensor, input: Tensor, down: Tensor, up: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    return input.new_empty(input.shape), torch.empty_like(down), torch.empty_like(up)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, input, down, up, ctx.scaling = inputs
    ctx.save_for_backward(input, down, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.vlmbuild.lora_backward(grad, *ctx.saved_tensors, ctx.scaling)
    return (grad, *gradients, None)


lora.register_autograd(_backward, setup_context=_context)

"""A linear layer's result plus its low-rank adapter (LoRA, arXiv:2106.09685, section 4.1).

One operator, so that nothing but the layer's input in its own dtype is kept for backward, and so that the product is added
where it is made: written out, casts, product, scale and sum are five passes over the layer's result. On a GPU it is one pass
(`vlmbuild.ops.lora.triton`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from vlmbuild.errors import UsageError

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def lora_reference(base: Tensor, input: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """base + scaling * (input @ down.T) @ up.T in float32, in the dtype of `base`; differentiable plain torch."""
    low = input.float() @ down.float().T
    return (base.float() + scaling * (low @ up.float().T)).to(base.dtype)


def _check(base: Tensor, input: Tensor, down: Tensor, up: Tensor) -> None:
    features = (input.shape[-1], base.shape[-1])
    wanted = ((down.shape[0], features[0]), (features[1], down.shape[0]))
    if (tuple(down.shape), tuple(up.shape)) != wanted or base.shape[:-1] != input.shape[:-1]:
        raise UsageError(
            f"lora: base {tuple(base.shape)}, input {tuple(input.shape)}, down {tuple(down.shape)}, up {tuple(up.shape)}; "
            "wanted [..., out], [..., in], [r, in], [out, r]"
        )
    if down.dtype != up.dtype or {base.dtype, input.dtype, down.dtype} - set(_FLOATS):
        raise UsageError(
            f"lora: {base.dtype}, {input.dtype}, {down.dtype}, {up.dtype}; wanted floats, one for both matrices"
        )


def _in_float32(tensor: Tensor) -> AbstractContextManager[None]:
    """The products as they are written, also under a caller's autocast."""
    guard: AbstractContextManager[None] = torch.autocast(tensor.device.type, enabled=False)
    return guard


@torch.library.custom_op(
    "vlmbuild::lora",
    mutates_args=(),
    schema="(Tensor base, Tensor input, Tensor down, Tensor up, float scaling) -> Tensor",
)
def lora(base: Tensor, input: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """See `lora_reference`: `[..., out]` from base `[..., out]`, input `[..., in]`, down `[r, in]` and up `[out, r]`.

    Differentiable in all tensors. The products are in float32, also under autocast. Matrices are float32; FSDP2's mixed
    precision hands them over in a smaller dtype.

    Raises:
        UsageError: Shapes or dtypes do not fit.
    """
    _check(base, input, down, up)
    return _plain_sum(base, input, down, up, scaling)


@lora.register_kernel("cuda")
def _(base: Tensor, input: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    _check(base, input, down, up)
    if kernels := _triton():
        total: Tensor = kernels.lora_triton(base, input, down, up, scaling)
        return total
    return _plain_sum(base, input, down, up, scaling)


def _plain_sum(base: Tensor, input: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    total = base.reshape(-1, base.shape[-1]).to(torch.float32, copy=True)
    with _in_float32(base):
        total.addmm_(_low(input, down), up.float().T, alpha=scaling)
    return total.to(base.dtype).view(base.shape)


def _triton() -> Any:
    """The module of Triton kernels, or None where Triton is missing (it is Linux only)."""
    try:
        from vlmbuild.ops.lora import triton as lora_triton
    except ModuleNotFoundError:
        return None
    return lora_triton


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
    """Gradients of `lora` for input, down and up. The one for the base is `grad` itself."""
    return _plain_gradients(grad, input, down, up, scaling)


@lora_backward.register_kernel("cuda")
def _(grad: Tensor, input: Tensor, down: Tensor, up: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    if kernels := _triton():
        gradients: tuple[Tensor, Tensor, Tensor] = kernels.lora_backward_triton(grad, input, down, up, scaling)
        return gradients
    return _plain_gradients(grad, input, down, up, scaling)


def _plain_gradients(
    grad: Tensor, input: Tensor, down: Tensor, up: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = input.reshape(-1, input.shape[-1]).float()
    of_result = grad.reshape(-1, grad.shape[-1]).float()
    with _in_float32(grad):
        low = wide @ down.float().T
        of_low = (of_result @ up.float()).mul_(scaling)
        return (
            (of_low @ down.float()).to(input.dtype).view(input.shape),
            (of_low.T @ wide).to(down.dtype),
            (of_result.T @ low).mul_(scaling).to(up.dtype),
        )


@lora_backward.register_fake
def _(grad: Tensor, input: Tensor, down: Tensor, up: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    return input.new_empty(input.shape), torch.empty_like(down), torch.empty_like(up)


def _low(input: Tensor, down: Tensor) -> Tensor:
    return input.reshape(-1, input.shape[-1]).float() @ down.float().T


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, input, down, up, ctx.scaling = inputs
    ctx.save_for_backward(input, down, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.vlmbuild.lora_backward(grad, *ctx.saved_tensors, ctx.scaling)
    return (grad, *gradients, None)


lora.register_autograd(_backward, setup_context=_context)

"""The lowered attention operators: `vlmbuild::attention_sdpa`, `attention_triton`, `attention_auto`.

Each is a composite over a forward and a backward operator; `attention_auto` leaves the choice of kernel to the
dispatcher, by the device of the tensors, so that a graph holds no branch. On CUDA it falls back from Triton to torch's
kernels for what Triton's cannot do (float64, a platform without triton).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmbuild.errors import DeviceError
from vlmbuild.ops.attention.op import BACKWARD_SCHEMA, FORWARD_SCHEMA, SCHEMA, Masks, check_attention
from vlmbuild.ops.attention.sdpa import Grads, logsumexp_like, sdpa_backward, sdpa_forward
from vlmbuild.ops.attention.visible import name_kernels, show_launches

Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., Grads]


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    _require_triton()
    from vlmbuild.ops.attention.triton import attention_forward_triton

    return attention_forward_triton(*args)


def _triton_backward(*args: Any) -> Grads:
    _require_triton()
    from vlmbuild.ops.attention.triton import attention_backward_triton

    return attention_backward_triton(*args)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _require_triton() -> None:
    if not _has_triton():
        raise DeviceError("attention_triton: triton is not installed (it is Linux only); use 'sdpa' or 'auto'")


def _auto_takes_triton(query: Tensor) -> bool:
    return query.dtype != torch.float64 and _has_triton()


def _auto_cuda_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    forward = _triton_forward if _auto_takes_triton(query) else sdpa_forward
    return forward(query, key, value, *rest)


def _auto_cuda_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Grads:
    backward = _triton_backward if _auto_takes_triton(query) else sdpa_backward
    return backward(grad, query, key, value, *rest)


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_groups: Tensor | None,
    visible_groups: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    check_attention(query, key, value, Masks(key_mask, cu_seqlens, key_groups, visible_groups), causal)
    batch, heads, length, dim = query.shape
    return query.new_empty((batch, length, heads, dim)), logsumexp_like(query)


def _backward_fake(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Grads:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _forward_shown(query: Tensor, _key: Tensor, _value: Tensor, *rest: Any) -> bool:
    """Not of one row, nor of groups of keys: into how many parts keys are split, and how many words hold a row's groups, would
    be conditions of the compiled graph."""
    *_, key_groups, _visible, _causal, _scale = rest
    known = query.is_cuda and query.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return known and query.shape[2] != 1 and key_groups is None


def _kernels() -> list[Any]:
    from vlmbuild.ops.attention.kernels_backward import grad_key_kernel, grad_query_kernel
    from vlmbuild.ops.attention.kernels_forward import forward_kernel
    from vlmbuild.ops.attention.triton_ranges import groups_kernel, segments_kernel, words_kernel

    return [forward_kernel, grad_query_kernel, grad_key_kernel, groups_kernel, segments_kernel, words_kernel]


def _backward_shown(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> bool:
    *masks, _out, _logsumexp, causal, scale = rest
    return _forward_shown(query, key, value, *masks, causal, scale)


def _register(name: str, forward: Forward, backward: Backward, cuda: tuple[Forward, Backward] | None = None) -> None:
    """Define `vlmbuild::{name}`, its forward and backward, and the kernels that CUDA tensors get instead."""
    full = f"vlmbuild::{name}"
    forward_op = torch.library.custom_op(f"{full}_forward", forward, mutates_args=(), schema=FORWARD_SCHEMA)
    backward_op = torch.library.custom_op(f"{full}_backward", backward, mutates_args=(), schema=BACKWARD_SCHEMA)
    forward_op.register_fake(_forward_fake)
    backward_op.register_fake(_backward_fake)
    if cuda is not None:
        forward_op.register_kernel("cuda", cuda[0])
        backward_op.register_kernel("cuda", cuda[1])
    if cuda is not None and _has_triton():
        show_launches(forward_op, _triton_forward, _forward_shown)
        show_launches(backward_op, _triton_backward, _backward_shown)
        name_kernels(full, _kernels)
    forward_overload = getattr(torch.ops.vlmbuild, f"{name}_forward").default
    backward_overload = getattr(torch.ops.vlmbuild, f"{name}_backward").default

    def gradient(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = backward_overload(grad, *ctx.saved_tensors, ctx.causal, ctx.scale)
        return (*grads, None, None, None, None, None, None)

    forward_op.register_autograd(gradient, setup_context=_context)

    def composite(*args: Any) -> Tensor:
        out: Tensor = forward_overload(*args)[0]
        return out

    torch.library.define(full, SCHEMA)
    torch.library.impl(full, "CompositeImplicitAutograd", composite)


_register("attention_sdpa", sdpa_forward, sdpa_backward)
_register("attention_triton", _triton_forward, _triton_backward, cuda=(_triton_forward, _triton_backward))
_register("attention_auto", sdpa_forward, sdpa_backward, cuda=(_auto_cuda_forward, _auto_cuda_backward))

"""The lowered attention operators: `vlmbuild::attention_sdpa`, `attention_triton`, `attention_auto`.

Each is a composite over a forward and a backward operator. `attention_auto` leaves the choice of kernel to the dispatcher, by
the device of the tensors, so that a graph holds no branch; on CUDA `auto_kernels` chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmbuild.errors import DeviceError
from vlmbuild.ops import tiles
from vlmbuild.ops.attention import varlen
from vlmbuild.ops.attention.op import BACKWARD_SCHEMA, FORWARD_SCHEMA, SCHEMA, Masks, check_attention
from vlmbuild.ops.attention.sdpa import Grads, logsumexp_like, sdpa_backward, sdpa_forward
from vlmbuild.ops.attention.visible import name_kernels, show_launches
from vlmbuild.util.dtypes import FLOATS

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


def _require_triton() -> None:
    if not tiles.has_triton():
        raise DeviceError("attention_triton: triton is not installed (it is Linux only); use 'sdpa' or 'auto'")


def auto_kernels(query: Tensor, masks: Masks) -> tuple[Forward, Backward]:
    """Return the forward and the backward that `attention_auto` runs on a GPU.

    Ours where a benchmark measured them on this chip (`vlmbuild.ops.tiles.is_measured`), and for groups of keys, which no
    kernel of torch takes; otherwise torch's for packed segments, if it takes the call, and SDPA.
    """
    if tiles.runs_by_default("attention", query) or (masks.key_groups is not None and _triton_can_run(query)):
        return _triton_forward, _triton_backward
    if varlen.takes(query, masks):
        return varlen.varlen_forward, varlen.varlen_backward
    return sdpa_forward, sdpa_backward


def _triton_can_run(query: Tensor) -> bool:
    return query.dtype != torch.float64 and tiles.has_triton()


def _auto_cuda_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *masks, _causal, _scale = rest
    return auto_kernels(query, Masks(*masks))[0](query, key, value, *rest)


def _auto_cuda_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Grads:
    *masks, _out, _logsumexp, _causal, _scale = rest
    return auto_kernels(query, Masks(*masks))[1](grad, query, key, value, *rest)


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
    """Return whether compilers may see the launches: not of one row, nor of groups of keys, because the number of parts that
    keys are split into, and of words that hold a row's groups, would become conditions of the compiled graph."""
    *_, key_groups, _visible, _causal, _scale = rest
    known = query.is_cuda and query.dtype in FLOATS
    return known and query.shape[2] != 1 and key_groups is None


def _kernels() -> list[Any]:
    from vlmbuild.ops.attention.kernels_backward import grad_key_kernel, grad_query_kernel
    from vlmbuild.ops.attention.kernels_forward import forward_kernel
    from vlmbuild.ops.attention.triton_ranges import groups_kernel, segments_kernel, words_kernel

    return [forward_kernel, grad_query_kernel, grad_key_kernel, groups_kernel, segments_kernel, words_kernel]


def _backward_shown(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> bool:
    *masks, _out, _logsumexp, causal, scale = rest
    return _forward_shown(query, key, value, *masks, causal, scale)


def _by_default(shown: Callable[..., bool], index: int) -> Callable[..., bool]:
    """Restrict a condition to calls whose query, at `index`, is on a GPU where our kernels are the default."""
    return lambda *args: tiles.runs_by_default("attention", args[index]) and shown(*args)


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
    if cuda is not None and tiles.has_triton():
        auto = name == "attention_auto"
        show_launches(forward_op, _triton_forward, _by_default(_forward_shown, 0) if auto else _forward_shown)
        show_launches(backward_op, _triton_backward, _by_default(_backward_shown, 1) if auto else _backward_shown)
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

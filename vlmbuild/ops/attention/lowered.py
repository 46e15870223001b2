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
from vlmbuild.ops.attention.op import (
    BACKWARD_SCHEMA,
    FORWARD_SCHEMA,
    NO_GRADS,
    SCHEMA,
    Grads,
    Masks,
    fake_grads,
    fake_output,
    flat,
)
from vlmbuild.ops.attention.sdpa import logsumexp_like, sdpa_backward, sdpa_forward

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
        raise DeviceError(
            "attention_triton needs triton, which is not installed (it is Linux only). Build with --attention sdpa or auto."
        )


def auto_kernels(query: Tensor, masks: Masks) -> tuple[Forward, Backward]:
    """Return the forward and the backward that `attention_auto` runs on a GPU.

    Ours where a benchmark measured them on this chip (`vlmbuild.ops.tiles.is_measured`), and for groups of keys and blocks of
    tokens, which no kernel of torch takes; otherwise torch's for packed segments, if it takes the call, and SDPA.
    """
    ours_alone = masks.key_groups is not None or (masks.lookahead is not None and query.shape[2] > 1)
    takes = ours_alone and query.dtype != torch.float64 and tiles.has_triton()
    if takes or tiles.runs_by_default("attention", query):
        return _triton_forward, _triton_backward
    if varlen.takes(query, masks):
        return varlen.varlen_forward, varlen.varlen_backward
    return sdpa_forward, sdpa_backward


def _auto_cuda_forward(query: Tensor, key: Tensor, value: Tensor, masks: Masks, *rest: Any) -> tuple[Tensor, Tensor]:
    return auto_kernels(query, masks)[0](query, key, value, masks, *rest)


def _auto_cuda_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, masks: Masks, *rest: Any) -> Grads:
    return auto_kernels(query, masks)[1](grad, query, key, value, masks, *rest)


def _forward_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return fake_output(query, *rest), logsumexp_like(query)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale, lookahead, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output, lookahead)


def _as_autocast(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Convert query, key and value of several dtypes (where some have a norm) as autocast does for torch's attention."""
    kind = query.device.type
    if len({query.dtype, key.dtype, value.dtype}) > 1 and kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    return query, key, value, *rest


def _register(name: str, forward: Forward, backward: Backward, cuda: tuple[Forward, Backward] | None = None) -> None:
    """Define `vlmbuild::{name}`, its forward and backward, and the kernels that CUDA tensors get instead."""
    full = f"vlmbuild::{name}"
    forward_op = torch.library.custom_op(f"{full}_forward", flat(forward), mutates_args=(), schema=FORWARD_SCHEMA)
    backward_op = torch.library.custom_op(
        f"{full}_backward", flat(backward, 4, 2), mutates_args=(), schema=BACKWARD_SCHEMA
    )
    forward_op.register_fake(flat(_forward_fake))
    backward_op.register_fake(fake_grads)
    if cuda is not None:
        forward_op.register_kernel("cuda", flat(cuda[0]))
        backward_op.register_kernel("cuda", flat(cuda[1], 4, 2))
    forward_overload = getattr(torch.ops.vlmbuild, f"{name}_forward").default
    backward_overload = getattr(torch.ops.vlmbuild, f"{name}_backward").default

    def gradient(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, lookahead = ctx.saved_tensors
        return *backward_overload(grad, *tensors, ctx.causal, ctx.scale, lookahead, ctx.window), *NO_GRADS

    forward_op.register_autograd(gradient, setup_context=_context)

    def composite(*args: Any) -> Tensor:
        out: Tensor = forward_overload(*_as_autocast(*args))[0]
        return out

    torch.library.define(full, SCHEMA)
    torch.library.impl(full, "CompositeImplicitAutograd", composite)


_register("attention_sdpa", sdpa_forward, sdpa_backward)
_register("attention_triton", _triton_forward, _triton_backward)
_register("attention_auto", sdpa_forward, sdpa_backward, cuda=(_auto_cuda_forward, _auto_cuda_backward))

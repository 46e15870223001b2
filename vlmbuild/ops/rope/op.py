"""Rotary position embeddings over several position axes: tables of cosines and sines, and the rotation by them.

M-RoPE is from section 2.1 of arXiv:2409.12191, its interleaved form from section 2 of arXiv:2511.21631, the rotation from
arXiv:2104.09864 (halves paired, not neighbours).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.ops import tiles


def cos_sin_reference(
    position_ids: Tensor,
    inv_freq: Tensor,
    sections: Sequence[int],
    shared: bool,
    scaling: float,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine of every rotation angle, for half of the head dimension (the other half is a copy).

    Args:
        position_ids: Integers `[axes, *rest]`.
        inv_freq: Frequencies in float32, `[sum(sections)]`, or `[section]` when `shared`.
        sections: Lanes per axis, one entry per axis.
        shared: Every axis starts again at `inv_freq[0]` (axial vision positions); otherwise the axes take consecutive
            ranges of `inv_freq` (M-RoPE).
        scaling: Factor on the cosines and sines.
        interleaved: The axes take turns, lane by lane, until an axis has its section; the first axis has all other
            lanes.

    Returns:
        Two float32 tensors `[*rest, sum(sections)]`.

    Raises:
        UsageError: The sections do not fit the axes or the frequencies.
    """
    _check_sections(position_ids, inv_freq, sections, shared, interleaved)
    if interleaved:
        angle = interleave(position_ids.unsqueeze(-1).float() * inv_freq.float(), sections)
        return angle.cos() * scaling, angle.sin() * scaling
    angles, start = [], 0
    for axis, lanes in enumerate(sections):
        frequencies = inv_freq if shared else inv_freq[start : start + lanes]
        angles.append(position_ids[axis].unsqueeze(-1).float() * frequencies.float())
        start += lanes
    angle = torch.cat(angles, dim=-1)
    return angle.cos() * scaling, angle.sin() * scaling


def interleave(tables: Tensor, sections: Sequence[int]) -> Tensor:
    """Let the axes of tables `[axes, *rest, lanes]` take turns: lane by lane, until an axis has its section's lanes."""
    axes, mixed = len(sections), tables[0]
    for axis in range(1, axes):
        start, end = axis, axes * sections[axis]
        mixed = torch.slice_scatter(mixed, tables[axis, ..., start:end:axes], -1, start, end, axes)
    return mixed


def _check_sections(
    position_ids: Tensor, inv_freq: Tensor, sections: Sequence[int], shared: bool, interleaved: bool
) -> None:
    if position_ids.dim() < 1 or position_ids.shape[0] != len(sections):
        raise UsageError(
            f"mrope_cos_sin: position_ids of shape {tuple(position_ids.shape)} for {len(sections)} sections; "
            "pass one section per position axis, axes first"
        )
    wanted = (sections[0],) * len(sections) if shared else tuple(sections)
    lanes = sections[0] if shared else sum(sections)
    if tuple(sections) != wanted or inv_freq.dim() != 1 or inv_freq.shape[0] != lanes:
        raise UsageError(
            f"mrope_cos_sin: sections {list(sections)} do not fit inv_freq of shape {tuple(inv_freq.shape)}; "
            + ("shared sections each have its length" if shared else "their sum must be its length")
        )
    if interleaved and (shared or last_turn(sections) >= lanes):
        raise UsageError(
            f"mrope_cos_sin: sections {list(sections)} cannot take turns in {lanes} lanes; the first must be the longest"
        )


def last_turn(sections: Sequence[int]) -> int:
    """Return the last lane that an axis other than the first takes of interleaved tables."""
    return max((axis + len(sections) * (size - 1) for axis, size in enumerate(sections) if axis), default=0)


def check_rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise UsageError unless the tables fit query and key, as in `rotate_reference`."""
    for name, x in (("query", query), ("key", key)):
        rows = (x.shape[0], *x.shape[2:-1])
        if x.dim() not in (3, 4) or cos.shape != sin.shape or tuple(cos.shape) != (*rows, x.shape[-1] // 2):
            raise UsageError(
                f"mrope_rotate: {name} of shape {tuple(x.shape)} does not fit cos {tuple(cos.shape)} and sin "
                f"{tuple(sin.shape)}; wanted [B, H, S, D] with [B, S, D/2], or [N, H, D] with [N, D/2]"
            )
        if x.shape[-1] % 2:
            raise UsageError(f"mrope_rotate: the head dimension of {name} is odd ({x.shape[-1]})")


def rotate_reference(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate query and key, as the formula reads: `x * cos + (-x2, x1) * sin` in float32, cast back.

    Args:
        query: `[B, H, S, D]`, or `[N, H, D]` for packed sequences; any strides.
        key: Like `query`, with its own number of heads.
        cos: Half tables, float32 `[B, S, D/2]`, or `[N, D/2]`.
        sin: Like `cos`.

    Raises:
        UsageError: Shapes do not fit.
    """
    check_rotate(query, key, cos, sin)
    full_cos = torch.cat((cos, cos), dim=-1).unsqueeze(1)
    full_sin = torch.cat((sin, sin), dim=-1).unsqueeze(1)

    def turn(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        # Through empty_like, so that the result has the layout every implementation promises.
        return torch.empty_like(x).copy_(x * full_cos + turned * full_sin)

    return turn(query), turn(key)


def rotate_cpu(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `rotate_reference`, bit for bit, in few calls: the halves are swapped by rolling, and the sines have
    their sign."""
    check_rotate(query, key, cos, sin)
    cos, sin = torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)
    return _turn(query, cos, sin), _turn(key, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    return torch.mul(wide, cos).add_(wide.roll(x.shape[-1] // 2, -1).mul_(sin)).to(x.dtype)


@torch.library.custom_op(
    "vlmbuild::mrope_cos_sin",
    mutates_args=(),
    schema="(Tensor position_ids, Tensor inv_freq, int[] sections, bool shared, float scaling, bool interleaved=False) "
    "-> (Tensor cos, Tensor sin)",
)
def mrope_cos_sin(
    position_ids: Tensor,
    inv_freq: Tensor,
    sections: Sequence[int],
    shared: bool,
    scaling: float,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `cos_sin_reference`, which runs on every device: once per forward, and bit-equal to the model's own."""
    return cos_sin_reference(position_ids, inv_freq, sections, shared, scaling, interleaved)


@mrope_cos_sin.register_fake
def _(
    position_ids: Tensor,
    inv_freq: Tensor,
    sections: Sequence[int],
    shared: bool,
    scaling: float,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_sections(position_ids, inv_freq, sections, shared, interleaved)
    shape = (*position_ids.shape[1:], sum(sections))
    return inv_freq.new_empty(shape, dtype=torch.float32), inv_freq.new_empty(shape, dtype=torch.float32)


def _cos_sin_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _cos_sin_backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    return (None,) * 6


mrope_cos_sin.register_autograd(_cos_sin_backward, setup_context=_cos_sin_context)


@torch.library.custom_op(
    "vlmbuild::mrope_rotate",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
)
def mrope_rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `rotate_reference`; the results keep the dense layout of the inputs (`torch.empty_like`)."""
    return rotate_cpu(query, key, cos, sin)


@torch.library.custom_op(
    "vlmbuild::mrope_rotate_backward",
    mutates_args=(),
    schema="(Tensor grad_query, Tensor grad_key, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
)
def mrope_rotate_backward(grad_query: Tensor, grad_key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Compute gradients of `mrope_rotate`. A rotation is orthogonal: its transpose turns the other way."""
    return rotate_cpu(grad_query, grad_key, cos, -sin)


def _on_cuda(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    if not tiles.runs_by_default("rope", query):  # the plain form is the same function on any device
        return rotate_cpu(query, key, cos, -sin if back else sin)
    from vlmbuild.ops.rope.triton import rotate_triton

    check_rotate(query, key, cos, sin)
    return rotate_triton(query, key, cos, sin, back=back)


def _rotate_fake(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    check_rotate(query, key, cos, sin)
    return torch.empty_like(query), torch.empty_like(key)


mrope_rotate.register_kernel("cuda")(partial(_on_cuda, back=False))
mrope_rotate_backward.register_kernel("cuda")(partial(_on_cuda, back=True))
mrope_rotate.register_fake(_rotate_fake)
mrope_rotate_backward.register_fake(_rotate_fake)


def _rotate_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor, Tensor, None, None]:
    grads = torch.ops.vlmbuild.mrope_rotate_backward(grad_query, grad_key, *ctx.saved_tensors)
    return *grads, None, None


def _backward_backward(ctx: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *torch.ops.vlmbuild.mrope_rotate(query, key, *ctx.saved_tensors), None, None


mrope_rotate.register_autograd(_rotate_backward, setup_context=_rotate_context)
mrope_rotate_backward.register_autograd(_backward_backward, setup_context=_rotate_context)

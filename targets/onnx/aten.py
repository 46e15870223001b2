"""torch's own operators in ONNX: the table of those that captured programs are made of."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from vlmbuild.targets.onnx.translate import Handler, Site, Value

from vlmbuild.errors import PassError

aten = torch.ops.aten

Scalar = float | int | Value
_END = 2**63 - 1


def _unary(operation: str) -> Handler:
    return lambda site, x: site.builder.op(operation, x.name)


def _operand(site: Site, value: Scalar, like: Value | None = None) -> str:
    """A tensor as it is, a number in the dtype of the result or of `like`; a symbolic size as a scalar."""
    dtype = site.dtype((like or site).meta.dtype)
    if isinstance(value, Value):
        if isinstance(value.meta, torch.Tensor):
            return _promoted(site, value, dtype)
        scalar = site.builder.op("Squeeze", value.name, site.builder.constant([0]))
        return str(scalar if dtype == torch.int64 else site.builder.cast(scalar, dtype))
    return site.builder.constant(value, dtype)


def _promoted(site: Site, value: Value, dtype: torch.dtype) -> str:
    return value.name if site.dtype(value.meta.dtype) == dtype else site.builder.cast(value.name, dtype)


def _binary(operation: str) -> Handler:
    """Operands take the dtype of the result, as torch promotes them."""

    def handler(site: Site, one: Scalar, other: Scalar) -> str:
        return str(site.builder.op(operation, _operand(site, one), _operand(site, other)))

    return handler


def _compare(operation: str) -> Handler:
    def handler(site: Site, one: Value, other: Scalar) -> str:
        return str(site.builder.op(operation, one.name, _operand(site, other, one)))

    return handler


def _rsub(site: Site, x: Value, other: Scalar, alpha: int = 1) -> str:
    assert alpha == 1
    return str(site.builder.op("Sub", _operand(site, other), x.name))


def _power(site: Site, x: Value, exponent: float) -> str:
    if exponent == 2:
        return str(site.builder.op("Mul", x.name, x.name))
    return str(site.builder.op("Pow", x.name, _operand(site, exponent)))


def _rsqrt(site: Site, x: Value) -> str:
    return str(site.builder.op("Reciprocal", site.builder.op("Sqrt", x.name)))


def _silu(site: Site, x: Value) -> str:
    return str(site.builder.op("Mul", x.name, site.builder.op("Sigmoid", x.name)))


def _gelu(site: Site, x: Value, approximate: str = "none") -> str:
    return str(site.builder.op("Gelu", x.name, approximate=approximate))


def _clamp(site: Site, x: Value, least: Scalar | None = None, most: Scalar | None = None) -> str:
    bounds = [None if bound is None else _operand(site, bound) for bound in (least, most)]
    return str(site.builder.op("Clip", x.name, *bounds))


def _where(site: Site, condition: Value, one: Value, other: Value) -> str:
    return str(site.builder.op("Where", condition.name, _operand(site, one), _operand(site, other)))


def _to_dtype(site: Site, x: Value, dtype: torch.dtype, *_: Any) -> str:
    return _promoted(site, x, site.dtype(dtype))


def _view(site: Site, x: Value, sizes: Sequence[Any], *_: Any) -> str:
    return site.builder.reshape(x.name, site.sizes(sizes))


def _flatten(site: Site, x: Value, start: int = 0, end: int = -1) -> str:
    # The sizes around the flattened ones are copied from the input, where they stand at the same place.
    before, after = x.axis(start), range(x.axis(end) + 1, x.rank)
    sizes = [0] * before + [-1] + [size if isinstance(size := x.meta.shape[dim], int) else None for dim in after]
    if None in sizes:
        return site.builder.reshape(x.name, site.sizes(sizes))
    return site.builder.reshape(x.name, sizes)  # type: ignore[arg-type]


def _unflatten(site: Site, x: Value, dim: int, sizes: Sequence[Any]) -> str:
    axis = x.axis(dim)
    around = [size if (size := x.static(i)) is not None else site.builder.size(x.name, i) for i in range(x.rank)]
    parts = [size.name if isinstance(size, Value) else size for size in sizes]
    return site.builder.reshape(x.name, [*around[:axis], *parts, *around[axis + 1 :]])


def _expand(site: Site, x: Value, sizes: Sequence[Any], *_: Any) -> str:
    parts = [
        site.builder.constant([1 if size == -1 else size]) if isinstance(size, int) else size.name for size in sizes
    ]
    return str(site.builder.op("Expand", x.name, site.builder.op("Concat", *parts, axis=0)))


def _new_zeros(site: Site, x: Value, sizes: Sequence[Any], **_: Any) -> str:
    parts = [site.builder.constant([size]) if isinstance(size, int) else size.name for size in sizes]
    shape = site.builder.op("Concat", *parts, axis=0)
    return str(site.builder.op("Expand", site.builder.constant(0, site.dtype(site.meta.dtype)), shape))


def _transpose(site: Site, x: Value, one: int, other: int) -> str:
    order = list(range(x.rank))
    order[x.axis(one)], order[x.axis(other)] = x.axis(other), x.axis(one)
    return str(site.builder.op("Transpose", x.name, perm=order))


def _permute(site: Site, x: Value, dims: Sequence[int]) -> str:
    return str(site.builder.op("Transpose", x.name, perm=[x.axis(dim) for dim in dims]))


def _movedim(site: Site, x: Value, source: int, target: int) -> str:
    order = [axis for axis in range(x.rank) if axis != x.axis(source)]
    order.insert(x.axis(target), x.axis(source))
    return str(site.builder.op("Transpose", x.name, perm=order))


def _unsqueeze(site: Site, x: Value, dim: int) -> str:
    return str(site.builder.op("Unsqueeze", x.name, site.builder.constant([dim % (x.rank + 1)])))


def _squeeze(site: Site, x: Value, dim: int) -> str:
    return str(site.builder.op("Squeeze", x.name, site.builder.constant([x.axis(dim)])))


def _cat(site: Site, parts: Sequence[Value], dim: int = 0) -> str:
    return str(site.builder.op("Concat", *(part.name for part in parts), axis=parts[0].axis(dim)))


def _stack(site: Site, parts: Sequence[Value], dim: int = 0) -> str:
    axis = dim % (parts[0].rank + 1)
    raised = [site.builder.op("Unsqueeze", part.name, site.builder.constant([axis])) for part in parts]
    return str(site.builder.op("Concat", *raised, axis=axis))


def _unbind(site: Site, x: Value, dim: int = 0) -> tuple[str, ...]:
    count = x.static(dim)
    assert count is not None
    return tuple(_gather(site, x, dim, place) for place in range(count))


def _gather(site: Site, x: Value, dim: int, place: int) -> str:
    return str(site.builder.op("Gather", x.name, site.builder.constant(place), axis=x.axis(dim)))


def _split(site: Site, x: Value, sizes: Sequence[int], dim: int = 0) -> tuple[str, ...]:
    names = site.builder.op(
        "Split", x.name, site.builder.constant(list(sizes)), axis=x.axis(dim), outputs=len(sizes)
    )  # fmt: skip
    return (names,) if isinstance(names, str) else names


def _slice(site: Site, x: Value, dim: int = 0, start: Any = 0, end: Any = _END, step: int = 1) -> str:
    builder = site.builder
    bounds = [
        bound.name if isinstance(bound, Value) else builder.constant([default if bound is None else bound])
        for bound, default in ((start, 0), (end, _END))
    ]
    return str(builder.op("Slice", x.name, *bounds, builder.constant([x.axis(dim)]), builder.constant([step])))


def _index(site: Site, x: Value, indices: Sequence[Value | None]) -> str:
    if len(indices) == 1 and indices[0] is not None:
        return str(site.builder.op("Gather", x.name, indices[0].name, axis=0))
    if any(index is None for index in indices):
        raise PassError(
            "Indexing that skips an axis has no translation to ONNX. This is a limit of vlmbuild; report it."
        )
    rows = [site.builder.op("Unsqueeze", index.name, site.builder.constant([-1])) for index in indices if index]
    return str(site.builder.op("GatherND", x.name, site.builder.op("Concat", *rows, axis=-1)))


def _embedding(site: Site, table: Value, ids: Value, *_: Any) -> str:
    return str(site.builder.op("Gather", table.name, ids.name, axis=0))


def _mean(site: Site, x: Value, dims: Sequence[int], keepdim: bool = False) -> str:
    axes = site.builder.constant([x.axis(dim) for dim in dims])
    return str(site.builder.op("ReduceMean", x.name, axes, keepdims=int(keepdim)))


def _layer_norm(
    site: Site, x: Value, shape: Sequence[int], weight: Value, bias: Value, epsilon: float = 1e-5, *_: Any
) -> str:
    return str(site.builder.op("LayerNormalization", x.name, weight.name, bias.name, axis=-len(shape), epsilon=epsilon))


def _rms_norm(site: Site, x: Value, shape: Sequence[int], weight: Value, epsilon: float) -> str:
    return str(site.builder.op("RMSNormalization", x.name, weight.name, axis=-len(shape), epsilon=epsilon))


def _patches(site: Site, x: Value, weight: Value, bias: Value | None, stride: Sequence[int]) -> str:
    """A convolution whose kernel and stride are the whole input: a product."""
    if bias is not None or list(stride) != list(weight.meta.shape[2:]) or x.meta.shape[2:] != weight.meta.shape[2:]:
        raise PassError(
            "A convolution over overlapping patches has no translation to ONNX. This is a limit of vlmbuild; report it."
        )
    width = math.prod(weight.meta.shape[1:])
    flat, table = (site.builder.reshape(value.name, [-1, width]) for value in (x, weight))
    return site.builder.reshape(site.builder.op("Gemm", flat, table, transB=1), site.sizes(()))


def _sym_size(site: Site, x: Value, dim: int) -> str:
    return site.builder.size(x.name, x.axis(dim))


def _size_product(operation: str) -> Handler:
    """Of sizes, which are int64 [1]."""

    def handler(site: Site, *sizes: Value | int) -> str:
        names = [size.name if isinstance(size, Value) else site.builder.constant([size]) for size in sizes]
        return str(site.builder.op(operation, *names))

    return handler


def _arange(site: Site, *bounds: Any, **_: Any) -> str:
    start, end, step = {1: (0, *bounds, 1), 2: (*bounds, 1), 3: bounds}[len(bounds)]
    return str(site.builder.op("Range", *(_operand(site, bound) for bound in (start, end, step))))


def _cumsum(site: Site, x: Value, dim: int, **_: Any) -> str:
    value = _promoted(site, x, site.dtype(site.meta.dtype))
    return str(site.builder.op("CumSum", value, site.builder.constant(x.axis(dim))))


def _nonzero(site: Site, x: Value) -> str:
    return str(site.builder.op("Transpose", site.builder.op("NonZero", x.name), perm=[1, 0]))


def _floor_divide(site: Site, one: Value, other: Scalar, rounding_mode: str = "floor") -> str:
    """Of integers that are not negative: ONNX rounds towards zero."""
    assert rounding_mode in ("floor", "trunc")
    return str(site.builder.op("Div", _operand(site, one), _operand(site, other)))


def _sum(site: Site, x: Value, dims: Sequence[int], keepdim: bool = False) -> str:
    value = _promoted(site, x, site.dtype(site.meta.dtype))
    axes = site.builder.constant([x.axis(dim) for dim in dims])
    return str(site.builder.op("ReduceSum", value, axes, keepdims=int(keepdim)))


ATEN: dict[Any, Handler] = {
    aten.add.Tensor: _binary("Add"),
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.__and__.Tensor: lambda site, one, other: site.builder.op("And", one.name, other.name),
    aten.cat.default: _cat,
    aten.clamp.default: _clamp,
    aten.conv3d.default: _patches,
    aten.cos.default: _unary("Cos"),
    aten.cumsum.default: _cumsum,
    aten.div.Tensor_mode: _floor_divide,
    aten.embedding.default: _embedding,
    aten.eq.Scalar: _compare("Equal"),
    aten.expand.default: _expand,
    aten.flatten.using_ints: _flatten,
    aten.floor_divide.default: _floor_divide,
    aten.ge.Scalar: _compare("GreaterOrEqual"),
    aten.ge.Tensor: _compare("GreaterOrEqual"),
    aten.gelu.default: _gelu,
    aten.index.Tensor: _index,
    aten.layer_norm.default: _layer_norm,
    aten.lt.Tensor: _compare("Less"),
    aten.mean.dim: _mean,
    aten.movedim.int: _movedim,
    aten.mul.Tensor: _binary("Mul"),
    aten.neg.default: _unary("Neg"),
    aten.new_zeros.default: _new_zeros,
    aten.nonzero.default: _nonzero,
    aten.permute.default: _permute,
    aten.pow.Tensor_Scalar: _power,
    aten.remainder.Scalar: _binary("Mod"),
    aten.remainder.Tensor: _binary("Mod"),
    aten.reshape.default: _view,
    aten.rms_norm.default: _rms_norm,
    aten.rsqrt.default: _rsqrt,
    aten.rsub.Scalar: _rsub,
    aten.select.int: _gather,
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.silu.default: _silu,
    aten.sin.default: _unary("Sin"),
    aten.slice.Tensor: _slice,
    aten.split_with_sizes.default: _split,
    aten.squeeze.dim: _squeeze,
    aten.stack.default: _stack,
    aten.sub.Tensor: _binary("Sub"),
    aten.sum.dim_IntList: _sum,
    aten.sym_size.int: _sym_size,
    aten.tanh.default: _unary("Tanh"),
    aten.to.dtype: _to_dtype,
    aten.transpose.int: _transpose,
    aten.unbind.int: _unbind,
    aten.unflatten.int: _unflatten,
    aten.unsqueeze.default: _unsqueeze,
    aten.view.default: _view,
    aten.where.self: _where,
    operator.floordiv: _size_product("Div"),
    operator.mul: _size_product("Mul"),
}  # fmt: skip

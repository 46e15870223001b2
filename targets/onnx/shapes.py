"""torch's operators on shapes and sizes in ONNX; they compute nothing."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from vlmbuild.targets.onnx.translate import Handler, Site, Value

aten = torch.ops.aten

_END = 2**63 - 1


def _view(site: Site, x: Value, sizes: Sequence[Any], *_: Any) -> str:
    return site.builder.reshape(x.name, site.sizes(sizes))


def _flatten(site: Site, x: Value, start: int = 0, end: int = -1) -> str:
    # The sizes around the flattened ones are copied from the input, where they have the same index.
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
    return tuple(gather(site, x, dim, index) for index in range(count))


def gather(site: Site, x: Value, dim: int, index: int) -> str:
    """Select one index of a dimension, and drop the dimension."""
    return str(site.builder.op("Gather", x.name, site.builder.constant(index), axis=x.axis(dim)))


def _split(site: Site, x: Value, sizes: Sequence[int], dim: int = 0) -> tuple[str, ...]:
    names = site.builder.op("Split", x.name, site.builder.constant(list(sizes)), axis=x.axis(dim), outputs=len(sizes))
    return (names,) if isinstance(names, str) else names


def _slice(site: Site, x: Value, dim: int = 0, start: Any = 0, end: Any = _END, step: int = 1) -> str:
    builder = site.builder
    bounds = [
        bound.name if isinstance(bound, Value) else builder.constant([default if bound is None else bound])
        for bound, default in ((start, 0), (end, _END))
    ]
    return str(builder.op("Slice", x.name, *bounds, builder.constant([x.axis(dim)]), builder.constant([step])))


def _size_product(operation: str) -> Handler:
    """Build the handler of arithmetic on sizes, which are int64 [1]."""

    def handler(site: Site, *sizes: Value | int) -> str:
        names = [size.name if isinstance(size, Value) else site.builder.constant([size]) for size in sizes]
        return str(site.builder.op(operation, *names))

    return handler


def _sym_size(site: Site, x: Value, dim: int) -> str:
    return site.builder.size(x.name, x.axis(dim))


SHAPES: dict[Any, Handler] = {
    aten.cat.default: _cat,
    aten.expand.default: _expand,
    aten.flatten.using_ints: _flatten,
    aten.movedim.int: _movedim,
    aten.new_zeros.default: _new_zeros,
    aten.permute.default: _permute,
    aten.reshape.default: _view,
    aten.select.int: gather,
    aten.slice.Tensor: _slice,
    aten.split_with_sizes.default: _split,
    aten.squeeze.dim: _squeeze,
    aten.stack.default: _stack,
    aten.sym_size.int: _sym_size,
    aten.transpose.int: _transpose,
    aten.unbind.int: _unbind,
    aten.unflatten.int: _unflatten,
    aten.unsqueeze.default: _unsqueeze,
    aten.view.default: _view,
    operator.floordiv: _size_product("Div"),
    operator.mul: _size_product("Mul"),
}

"""Translate torch's own operators, as captured programs have them, to ONNX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from vlmbuild.errors import PassError
from vlmbuild.targets.onnx.shapes import SHAPES
from vlmbuild.targets.onnx.translate import Handler, Site, Value

aten = torch.ops.aten

Scalar = float | int | Value


def _unary(operation: str) -> Handler:
    return lambda site, x: site.builder.op(operation, x.name)


def _operand(site: Site, value: Scalar, like: Value | None = None) -> str:
    """Return a tensor as it is, a number in the dtype of the result or of `like`, a symbolic size as a scalar."""
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
    """Build the handler of a binary operator; operands take the dtype of the result, as torch promotes them."""

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


def _clamp(site: Site, x: Value, least: Scalar | None = None, most: Scalar | None = None) -> str:
    bounds = [None if bound is None else _operand(site, bound) for bound in (least, most)]
    return str(site.builder.op("Clip", x.name, *bounds))


def _where(site: Site, condition: Value, one: Value, other: Value) -> str:
    return str(site.builder.op("Where", condition.name, _operand(site, one), _operand(site, other)))


def _to_dtype(site: Site, x: Value, dtype: torch.dtype, *_: Any) -> str:
    return _promoted(site, x, site.dtype(dtype))


def _index(site: Site, x: Value, indices: Sequence[Value | None]) -> str:
    if len(indices) == 1 and indices[0] is not None:
        return str(site.builder.op("Gather", x.name, indices[0].name, axis=0))
    if any(index is None for index in indices):
        raise PassError(
            "Indexing that skips an axis has no translation to ONNX. This is a limit of vlmbuild; report it."
        )
    rows = [site.builder.op("Unsqueeze", index.name, site.builder.constant([-1])) for index in indices if index]
    return str(site.builder.op("GatherND", x.name, site.builder.op("Concat", *rows, axis=-1)))


def _mean(site: Site, x: Value, dims: Sequence[int], keepdim: bool = False) -> str:
    axes = site.builder.constant([x.axis(dim) for dim in dims])
    return str(site.builder.op("ReduceMean", x.name, axes, keepdims=int(keepdim)))


def _layer_norm(
    site: Site, x: Value, shape: Sequence[int], weight: Value, bias: Value, epsilon: float = 1e-5, *_: Any
) -> str:
    return str(site.builder.op("LayerNormalization", x.name, weight.name, bias.name, axis=-len(shape), epsilon=epsilon))


def _patches(site: Site, x: Value, weight: Value, bias: Value | None, stride: Sequence[int]) -> str:
    """Translate a convolution whose kernel and stride are the whole input: a product."""
    if list(stride) != list(weight.meta.shape[2:]) or x.meta.shape[2:] != weight.meta.shape[2:]:
        raise PassError(
            "A convolution over overlapping patches has no translation to ONNX. This is a limit of vlmbuild; report it."
        )
    width = math.prod(weight.meta.shape[1:])
    flat, table = (site.builder.reshape(value.name, [-1, width]) for value in (x, weight))
    product = site.builder.op("Gemm", flat, table, bias.name if bias else None, transB=1)
    return site.builder.reshape(product, site.sizes(()))


def _arange(site: Site, *bounds: Any, **_: Any) -> str:
    start, end, step = {1: (0, *bounds, 1), 2: (*bounds, 1), 3: bounds}[len(bounds)]
    return str(site.builder.op("Range", *(_operand(site, bound) for bound in (start, end, step))))


def _cumsum(site: Site, x: Value, dim: int, **_: Any) -> str:
    value = _promoted(site, x, site.dtype(site.meta.dtype))
    return str(site.builder.op("CumSum", value, site.builder.constant(x.axis(dim))))


def _floor_divide(site: Site, one: Value, other: Scalar, rounding_mode: str = "floor") -> str:
    """Divide non-negative integers; ONNX rounds towards zero."""
    assert rounding_mode in ("floor", "trunc")
    return str(site.builder.op("Div", _operand(site, one), _operand(site, other)))


def _sum(site: Site, x: Value, dims: Sequence[int], keepdim: bool = False) -> str:
    value = _promoted(site, x, site.dtype(site.meta.dtype))
    axes = site.builder.constant([x.axis(dim) for dim in dims])
    return str(site.builder.op("ReduceSum", value, axes, keepdims=int(keepdim)))


ATEN: dict[Any, Handler] = {
    **SHAPES,
    aten.add.Tensor: _binary("Add"),
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.__and__.Tensor: lambda site, one, other: site.builder.op("And", one.name, other.name),
    aten.clamp.default: _clamp,
    aten.conv3d.default: _patches,
    aten.cos.default: _unary("Cos"),
    aten.cumsum.default: _cumsum,
    aten.div.Tensor: _binary("Div"),
    aten.div.Tensor_mode: _floor_divide,
    aten.embedding.default: lambda site, table, ids, *_: site.builder.op("Gather", table.name, ids.name, axis=0),
    aten.eq.Scalar: _compare("Equal"),
    aten.floor.default: _unary("Floor"),
    aten.ge.Scalar: _compare("GreaterOrEqual"),
    aten.ge.Tensor: _compare("GreaterOrEqual"),
    aten.gelu.default: lambda site, x, approximate="none": site.builder.op("Gelu", x.name, approximate=approximate),
    aten.index.Tensor: _index,
    aten.layer_norm.default: _layer_norm,
    aten.log.default: _unary("Log"),
    aten.lt.Tensor: _compare("Less"),
    aten.matmul.default: _binary("MatMul"),
    aten.mean.dim: _mean,
    aten.mul.Tensor: _binary("Mul"),
    aten.neg.default: _unary("Neg"),
    aten.nonzero.default: lambda site, x: site.builder.op("Transpose", site.builder.op("NonZero", x.name), perm=[1, 0]),
    aten.pow.Tensor_Scalar: _power,
    aten.remainder.Scalar: _binary("Mod"),
    aten.remainder.Tensor: _binary("Mod"),
    aten.rms_norm.default: lambda site, x, shape, weight, epsilon: site.builder.op(
        "RMSNormalization", x.name, weight.name, axis=-len(shape), epsilon=epsilon
    ),
    aten.rsqrt.default: lambda site, x: site.builder.op("Reciprocal", site.builder.op("Sqrt", x.name)),
    aten.rsub.Scalar: _rsub,
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.silu.default: lambda site, x: site.builder.op("Mul", x.name, site.builder.op("Sigmoid", x.name)),
    aten.sin.default: _unary("Sin"),
    aten.sub.Tensor: _binary("Sub"),
    aten.sum.dim_IntList: _sum,
    aten.tanh.default: _unary("Tanh"),
    aten.to.dtype: _to_dtype,
    aten.where.self: _where,
}

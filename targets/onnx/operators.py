"""The project's own operators in ONNX, and torch's linear layers on weights in any format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch

from vlmbuild.errors import PassError
from vlmbuild.formats import PackedWeight
from vlmbuild.ops import OPERATORS
from vlmbuild.targets.onnx.aten import ATEN
from vlmbuild.targets.onnx.attention import attention
from vlmbuild.targets.onnx.graph_builder import CONTRIB, GraphBuilder
from vlmbuild.targets.onnx.translate import Handler, Site, Value


def table(packed: Mapping[str, PackedWeight]) -> dict[Any, Handler]:
    """Return operator -> translation.

    Args:
        packed: Name -> the weights of `linear_packed` and `embedding_packed`.
    """
    forms = FORMS | {
        "embedding_packed": partial(_embedding_packed, packed),
        "linear_packed": partial(_linear_packed, packed),
    }
    ours = {OPERATORS[name].overload: form for name, form in forms.items()}
    return {**ATEN, torch.ops.aten.linear.default: _linear, **ours}


def _linear(site: Site, x: Value, weight: Value, bias: Value | None = None) -> str:
    """Translate to Gemm on the weight as it is stored; a MatMul, no faster, would need a transposed copy."""
    flat = x.name if x.rank == 2 else site.builder.reshape(x.name, [-1, weight.meta.shape[1]])
    product = str(site.builder.op("Gemm", flat, weight.name, bias.name if bias else None, transB=1))
    if x.rank == 2:
        return product
    if sum(not isinstance(size, int) for size in site.meta.shape) <= 1:
        return site.builder.reshape(product, site.sizes(()))
    rows = [x.static(axis) or site.builder.size(x.name, axis) for axis in range(x.rank - 1)]
    return site.builder.reshape(product, [*rows, weight.meta.shape[0]])


def _linear_packed(
    packed: Mapping[str, PackedWeight], site: Site, x: Value, slot: Value, bias: Value | None, _format: str
) -> str:
    name, weight = slot.name, packed[slot.name]
    tensors = [name + suffix for suffix in weight.parts]
    product = str(site.builder.op(weight.operator, x.name, *tensors, domain=CONTRIB, **weight.attributes))
    return product if bias is None else str(site.builder.op("Add", product, bias.name))


def _embedding_packed(packed: Mapping[str, PackedWeight], site: Site, slot: Value, ids: Value, _format: str) -> str:
    """Look rows of codes and scales up, and dequantize these: `(code - zero) * scale`.

    In standard operators: GatherBlockQuantized does the same, but the builds of ONNX Runtime that browsers load lack it.
    """
    builder, weight = site.builder, packed[slot.name]
    form = {key: weight.attributes[key] for key in ("K", "N", "bits", "block_size")}
    rows = {suffix: builder.op("Gather", slot.name + suffix, ids.name, axis=0) for suffix in weight.parts}
    builder.annotate(rows[""], form)
    last = builder.constant([-1])
    zero = builder.constant(2.0 ** (form["bits"] - 1), torch.float32)
    if "_zero_points" in rows:
        points = _codes(builder, rows["_zero_points"], form["bits"], ids.rank + 1)
        blocks = weight.parts[""].shape[1]
        zero = builder.op("Unsqueeze", _first(builder, points, blocks), last)
    scales = builder.op("Unsqueeze", builder.cast(rows["_scales"], torch.float32), last)
    codes = _codes(builder, rows[""], form["bits"], ids.rank + 2)
    values = builder.op("Mul", builder.op("Sub", codes, zero), scales)
    values = builder.reshape(values, [*[0] * ids.rank, -1])
    if form["K"] % form["block_size"]:
        values = _first(builder, values, form["K"])
    return str(values if builder.compute == torch.float32 else builder.cast(values, builder.compute))


def _codes(builder: GraphBuilder, stored: str, bits: int, rank: int) -> str:
    """Convert bytes to codes in float32: one each, or two along the last axis, the low one first."""
    whole = builder.cast(stored, torch.float32)
    if bits == 8:
        return whole
    sixteen, last = builder.constant(16.0, torch.float32), builder.constant([-1])
    high = builder.op("Floor", builder.op("Div", whole, sixteen))
    low = builder.op("Sub", whole, builder.op("Mul", high, sixteen))
    pairs = builder.op("Concat", builder.op("Unsqueeze", low, last), builder.op("Unsqueeze", high, last), axis=-1)
    return builder.reshape(pairs, [*[0] * (rank - 1), -1])


def _first(builder: GraphBuilder, values: str, count: int) -> str:
    """Return the first values along the last axis."""
    start, end, axis = (builder.constant([number]) for number in (0, count, -1))
    return str(builder.op("Slice", values, start, end, axis))


def _cos_sin(
    site: Site,
    positions: Value,
    frequencies: Value,
    sections: Sequence[int],
    shared: bool,
    scaling: float,
    interleaved: bool = False,
) -> tuple[str, str]:
    """Build tables [*rest, sum(sections)] in float32: the angles of each axis side by side, or in turns."""
    builder = site.builder
    starts = [0 if shared else sum(sections[:axis]) for axis in range(len(sections))]
    angles = []
    for axis, (start, lanes) in enumerate(zip(starts, sections, strict=True)):
        place = builder.op("Gather", positions.name, builder.constant(axis), axis=0)
        column = builder.op("Unsqueeze", builder.cast(place, torch.float32), builder.constant([-1]))
        own = frequencies.name
        if not interleaved:
            range_ = (builder.constant([start]), builder.constant([start + lanes]), builder.constant([0]))
            own = builder.op("Slice", own, *range_)
        angles.append(builder.op("Mul", column, own))
    if interleaved:
        angle = _in_turns(builder, angles, sections)
    else:
        angle = builder.op("Concat", *angles, axis=-1) if len(angles) > 1 else angles[0]
    tables = (builder.op("Cos", angle), builder.op("Sin", angle))
    if scaling == 1:
        return tables
    factor = builder.constant(scaling, torch.float32)
    return builder.op("Mul", tables[0], factor), builder.op("Mul", tables[1], factor)


def _in_turns(builder: GraphBuilder, angles: Sequence[str], sections: Sequence[int]) -> str:
    """Select the lanes of each axis from its angles of all lanes."""
    axes, selected = len(sections), angles[0]
    for axis in range(1, axes):
        own = [lane % axes == axis and lane < axes * sections[axis] for lane in range(sum(sections))]
        selected = builder.op("Where", builder.constant(own, torch.bool), angles[axis], selected)
    return selected


def _rotate(site: Site, query: Value, key: Value, cos: Value, sin: Value) -> tuple[str, str]:
    """Translate to RotaryEmbedding in float32, on [1, H, S, D]; packed [N, H, D] is brought to that form and back."""
    tables = [_rows(site, value) for value in (cos, sin)]
    return _turned(site, query, tables), _turned(site, key, tables)


def _rows(site: Site, table: Value) -> str:
    return table.name if table.rank == 3 else str(site.builder.op("Unsqueeze", table.name, site.builder.constant([0])))


def _turned(site: Site, states: Value, tables: Sequence[str]) -> str:
    builder, packed = site.builder, states.rank == 3
    x = states.name
    if packed:
        x = builder.op("Unsqueeze", builder.op("Transpose", x, perm=[1, 0, 2]), builder.constant([0]))
    half = builder.compute != torch.float32
    turned = builder.op("RotaryEmbedding", builder.cast(x, torch.float32) if half else x, *tables)
    if half:
        turned = builder.cast(turned, builder.compute)
    if packed:
        turned = builder.op("Transpose", builder.op("Squeeze", turned, builder.constant([0])), perm=[1, 0, 2])
    return str(turned)


def _refusal(name: str, remedy: str) -> Handler:
    def refuse(*_: Any) -> NoReturn:
        raise PassError(f"vlmbuild::{name} has no translation to ONNX. {remedy}")

    return refuse


_NOT_ONNX = "Build with `--quantize int4` or `--quantize none`; weights in this format are for the other targets."
FORMS: dict[str, Handler] = {
    "attention": attention,
    "attention_auto": attention,
    "attention_sdpa": attention,
    "attention_triton": _refusal("attention_triton", "Build with `--attention sdpa` or `--attention auto`."),
    "embedding_packed": partial(_embedding_packed, {}),
    "linear_4bit": _refusal("linear_4bit", _NOT_ONNX),
    "linear_8bit": _refusal("linear_8bit", _NOT_ONNX),
    "linear_packed": partial(_linear_packed, {}),
    "lora": _refusal("lora", "Merge the adapter: `vlmbuild build SOURCE --adapter DIR --target onnx`."),
    "mrope_cos_sin": _cos_sin,
    "mrope_rotate": _rotate,
}
"""Operator of a program -> its translation, or one that refuses it."""

"""A region as inductor takes it: a graph in the compute dtype, whose inputs' sizes can be read off one after
another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from vlmbuild.ir.dims import Dim, Shape, shape_names
from vlmbuild.ir.program import COMPUTE_DTYPE, Call, Geometry, Input, Program, Region, Variant
from vlmbuild.ir.shapes import Shapes
from vlmbuild.runtime.torch.region import with_dtype
from vlmbuild.targets.aoti.lowering import lower
from vlmbuild.targets.aoti.plan import of_one_token


def compilable(region: Region, dtype: torch.dtype, *, one_token: bool = False) -> tuple[GraphModule, tuple[int, ...]]:
    """Return a region's graph, with fake tensors at its placeholders, and the order of its activations.

    Code reads each size that changes from its inputs, and solves an expression such as "past + new" for its last
    unknown. So inputs come in an order in which there is never a second unknown; where there is none, the whole
    expression gets a name of its own.
    """
    activations = of_one_token(region.activations) if one_token else region.activations
    order = solvable_order(activations)
    shapes = activations if order is not None else with_names(activations)
    order = order or tuple(range(len(shapes)))
    graph = with_dtype(region, dtype, dropout=False)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    first = len(region.slots)
    for index in order:  # each behind all others
        graph.graph.output_node().prepend(placeholders[first + index])
    _placeholders_first(graph)
    _give_values(graph, region, [shapes[index] for index in order], order, dtype)
    lower(graph, one_token=one_token)
    return graph, order


def solvable_order(shapes: Sequence[Shape]) -> tuple[int, ...] | None:
    """Find an order of shapes in which every size has at most one name that is not known yet; None if there is none."""
    known: set[str] = set()
    order: list[int] = []
    while len(order) < len(shapes):
        found = next(
            (index for index, shape in enumerate(shapes) if index not in order and _solvable(shape, known)), None
        )
        if found is None:
            return None
        known.update(shape_names([shapes[found]]))
        order.append(found)
    return tuple(order)


def with_names(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """Name each size that changes: ("batch*new", 4), ("batch*new",) -> ("d0", 4), ("d0",)."""
    names: dict[Dim, Dim] = {}
    return tuple(
        tuple(names.setdefault(size, Dim.named(f"d{len(names)}")) if isinstance(size, Dim) else size for size in shape)
        for shape in shapes
    )


def _solvable(shape: Shape, known: set[str]) -> bool:
    known = set(known)
    for size in shape:
        unknown = set(shape_names([(size,)])) - known
        if len(unknown) > 1:
            return False
        known |= unknown
    return True


def _placeholders_first(graph: GraphModule) -> None:
    """Move placeholders in front of all other nodes."""
    nodes = list(graph.graph.nodes)
    first = next(node for node in nodes if node.op != "placeholder")
    for node in nodes[nodes.index(first) :]:
        if node.op == "placeholder":
            first.prepend(node)
    graph.recompile()


def _give_values(
    graph: GraphModule, region: Region, shapes: Sequence[Shape], order: Sequence[int], dtype: torch.dtype
) -> None:
    """Set fake tensors at the placeholders, from a program of this one call."""

    def chosen(wanted: torch.dtype) -> torch.dtype:
        return dtype if wanted == COMPUTE_DTYPE else wanted

    activations = region.placeholders()[len(region.slots) :]
    inputs = tuple(
        Input(f"in{index}", chosen(activations[index].meta["val"].dtype), shape)
        for index, shape in zip(order, shapes, strict=True)
    )
    results = tuple(f"out{index}" for index in range(len(region.results())))
    call = Call(region.name, "", tuple(entry.name for entry in inputs), results)
    slots = tuple(replace(slot, dtype=chosen(slot.dtype)) for slot in region.slots)
    alone = Region(region.name, graph, slots, ("",), tuple(shapes))
    variant = Variant(inputs, (call,), results[0])
    found = Shapes(Program("", Geometry(()), {"alone": variant}, {region.name: alone})).values[region.name]
    for node in graph.graph.nodes:
        node.meta.pop("val", None)
        if node.op == "placeholder":
            node.meta["val"] = _on_cpu(found[node])


def _on_cpu(value: Tensor) -> Tensor:
    with value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty(value.shape, dtype=value.dtype, device="cpu")

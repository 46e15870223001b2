"""The vision tower's host prologue, where a client passes a processor's outputs: traced, then translated like a
region."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph

from vlmbuild.families import ClientVision
from vlmbuild.ir.dims import Size, evaluate_shape, shape_names
from vlmbuild.ir.program import needed_nodes
from vlmbuild.rewrite.pattern import trace
from vlmbuild.targets.onnx.graph_builder import GraphBuilder
from vlmbuild.targets.onnx.operators import table
from vlmbuild.targets.onnx.translate import Translator

_EXAMPLE = (3, 5, 7, 11)
"""Sizes to trace with; distinct, so that none is taken for another."""


def add_prologue(builder: GraphBuilder, client: ClientVision) -> dict[str, str]:
    """Declare the client's inputs and compute the vision tower's from them: name -> value."""
    names = {}
    for entry in client.inputs:
        shape = [_dimension(size) for size in entry.shape]
        declare = builder.default_input if entry.name in client.optional else builder.take_input
        names[entry.name] = declare(entry.name, entry.dtype, shape)
    graph = traced(client)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    results: Any = graph.output_node().args[0]
    given = dict(zip(placeholders, names.values(), strict=True))
    builder.scope = "prologue"
    values = Translator(builder, table({})).run(graph, given, needed_nodes(results), "the vision prologue")
    return {name: values[node] for name, node in zip(client.outputs, results, strict=True)}


def traced(client: ClientVision) -> Graph:
    """Trace the prologue; no size is special in ONNX, so tracing leaves out sizes of one."""
    names = sorted(shape_names(entry.shape for entry in client.inputs))
    sizes = dict(zip(names, _EXAMPLE[: len(names)], strict=True))
    dims = {name: torch.export.Dim(name, min=2) for name in names}
    example = tuple(
        torch.empty(evaluate_shape(entry.shape, sizes), dtype=entry.dtype, device="meta") for entry in client.inputs
    )
    dynamic = tuple(
        {axis: size.evaluate(dims) for axis, size in enumerate(entry.shape) if not isinstance(size, int)}
        for entry in client.inputs
    )
    return trace(client.module, example, dynamic)


def _dimension(size: Size) -> int | str:
    """Name a dimension ("4*merged" -> merged_4), since clients take any other symbol for a size of its own."""
    if isinstance(size, int):
        return size
    ((factor, names),) = size.terms
    return "_".join([*names, *([str(factor)] if factor != 1 else [])])

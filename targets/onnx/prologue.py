"""The vision tower's host prologue, where a client passes what a processor returns: traced, then translated like a region."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import Dim
from torch.fx import Graph

from vlmbuild.families import ClientVision
from vlmbuild.ir.program import needed_nodes, parse_size
from vlmbuild.rewrite.pattern import trace
from vlmbuild.targets.onnx.graph import GraphBuilder
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
    """The prologue's graph; no size is special in ONNX, so that those of one may be left out of tracing."""
    sizes: list[int | str] = [size for entry in client.inputs for size in entry.shape]
    symbols = sorted({parse_size(size)[1] for size in sizes if isinstance(size, str)})
    dims = {name: Dim(name, min=2) for name in symbols}
    example, dynamic = [], []
    for entry in client.inputs:
        shape, axes = [], {}
        for axis, size in enumerate(entry.shape):
            factor, name = parse_size(size) if isinstance(size, str) else (size, "")
            shape.append(factor * _EXAMPLE[symbols.index(name)] if name else factor)
            if name:
                axes[axis] = factor * dims[name] if factor > 1 else dims[name]
        example.append(torch.empty(shape, dtype=entry.dtype, device="meta"))
        dynamic.append(axes)
    return trace(client.module, tuple(example), tuple(dynamic))


def _dimension(size: int | str) -> int | str:
    """ "4*merged" is called merged_4: a name, since a client takes any other symbol for a size of its own."""
    if isinstance(size, int):
        return size
    factor, name = parse_size(size)
    return name if factor == 1 else f"{name}_{factor}"

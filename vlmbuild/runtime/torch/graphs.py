"""Graph modules of a region in a compute dtype: one for compilers, and one that Python runs with less overhead.

A step of generation has operators so small that calling them takes longer than running them. An `OpOverload` is called through
its schema, where torch's function or method of the same name calls the same kernel directly; an operator written in Python
passes through Python at every level of the dispatcher.
"""

from __future__ import annotations

from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from vlmbuild.ir.program import COMPUTE_DTYPE, Region
from vlmbuild.runtime.torch.op_overrides import FOR_COMPILERS_OF_ONE_TOKEN, WITHOUT_GRADIENTS

DROPOUT = torch.ops.aten.dropout.default


def has_dropout(region: Region) -> bool:
    """Return whether a region draws random numbers in training."""
    return any(node.target is DROPOUT for node in region.graph.graph.nodes)


def aten_module(region: Region, dtype: torch.dtype, *, dropout: bool = True) -> GraphModule:
    """Copy a region's graph with `dtype` for `COMPUTE_DTYPE`, with or without its dropout."""
    graph = Graph()
    values: dict[Node, Node] = {}
    for node in region.graph.graph.nodes:
        if node.target is DROPOUT and not dropout:
            values[node] = values[node.args[0]]
            continue
        copied = graph.node_copy(node, values.__getitem__)
        copied.args = _with_dtype(copied.args, dtype)
        copied.kwargs = _with_dtype(copied.kwargs, dtype)
        copied.meta = {}
        values[node] = copied
    return GraphModule(nn.Module(), graph, class_name="Region")


def one_token_module(module: GraphModule) -> GraphModule:
    """Copy a graph for compilers of a step with one token per row."""
    graph = _copy(module)
    for node in graph.nodes:
        node.target = FOR_COMPILERS_OF_ONE_TOKEN.get(node.target, node.target)
    return GraphModule(nn.Module(), graph, class_name="Region")


def eager_module(module: GraphModule) -> GraphModule:
    """Copy a graph with torch's functions and methods in place of aten's operators, where they exist."""
    graph = _copy(module)
    for node in graph.nodes:
        if node.op == "call_function" and (override := _without_schema(node.target)):
            node.op, node.target = override
    return GraphModule(nn.Module(), graph, class_name="Region")


def _copy(module: GraphModule) -> Graph:
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return graph


def _without_schema(operator: object) -> tuple[str, Any] | None:
    """Return the kind of node, and its target, that call an operator without its schema."""
    if kernel := WITHOUT_GRADIENTS.get(operator):
        return "call_function", kernel
    if not isinstance(operator, OpOverload) or operator.namespace != "aten":
        return None
    if operator is torch.ops.aten.sym_size.int:
        return "call_method", "size"
    name = operator._schema.name.removeprefix("aten::")
    for namespace in (torch, torch._C._nn):
        function = getattr(namespace, name, None)
        if isinstance(function, BuiltinFunctionType):
            return "call_function", function
    return ("call_method", name) if isinstance(getattr(Tensor, name, None), MethodDescriptorType) else None


def _with_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _with_dtype(item, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_with_dtype(item, dtype) for item in value)
    return dtype if value is COMPUTE_DTYPE else value

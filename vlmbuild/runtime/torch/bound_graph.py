"""A region's graph in a compute dtype, as compilers read it and as Python runs it fastest.

A step of generation has operators so small that calling them takes longer than they do. An `OpOverload` is called through
its schema, where torch's function or method of the same name calls the same kernel at once; an operator that is written in
Python goes through Python at every level of the dispatcher.
"""

from __future__ import annotations

from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from vlmbuild.ir.program import COMPUTE_DTYPE, Region
from vlmbuild.runtime.compiler import Compiler
from vlmbuild.runtime.compiler import apply as run_compiled
from vlmbuild.runtime.torch.op_overrides import FOR_COMPILERS_OF_ONE_TOKEN, WITHOUT_GRADIENTS

DROPOUT = torch.ops.aten.dropout.default


class BoundGraph:
    """A region's graph with a compute dtype.

    Args:
        region: From a program.
        dtype: Takes the place of `COMPUTE_DTYPE`.
        dropout: Whether to keep its dropout.
        one_token: Whether compilers are to expect one token a row.
    """

    def __init__(self, region: Region, dtype: torch.dtype, *, dropout: bool = True, one_token: bool = False) -> None:
        module = aten_module(region, dtype, dropout=dropout)
        self.random = any(node.target is DROPOUT for node in module.graph.nodes)
        self.compiled = one_token_module(module) if one_token else module
        self.eager = _eager_module(module)

    def run(self, compiler: Compiler, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Call it, under the compiler if there is one."""
        if compiler is not None:
            return run_compiled(compiler, self.compiled.forward, tensors)
        results: tuple[Tensor, ...]
        if torch.is_grad_enabled():
            results = self.eager.forward(*tensors)
        else:
            with torch._C._AutoDispatchBelowAutograd():  # autograd of an operator in Python is Python too
                results = self.eager.forward(*tensors)
        return results


def aten_module(region: Region, dtype: torch.dtype, *, dropout: bool = True) -> GraphModule:
    """A copy of a region's graph with a dtype in the place of `COMPUTE_DTYPE`, with or without its dropout."""
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
    """A copy for compilers, of a step that has one token a row."""
    graph = _copy(module)
    for node in graph.nodes:
        node.target = FOR_COMPILERS_OF_ONE_TOKEN.get(node.target, node.target)
    return GraphModule(nn.Module(), graph, class_name="Region")


def _eager_module(module: GraphModule) -> GraphModule:
    """A copy with torch's functions and methods in the places of aten's operators, where there are any."""
    graph = _copy(module)
    for node in graph.nodes:
        if node.op == "call_function" and (spelled := _in_python(node.target)):
            node.op, node.target = spelled
    return GraphModule(nn.Module(), graph, class_name="Region")


def _copy(module: GraphModule) -> Graph:
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return graph


def _in_python(operator: object) -> tuple[str, Any] | None:
    """The kind of node, and its target, that call an operator without its schema."""
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

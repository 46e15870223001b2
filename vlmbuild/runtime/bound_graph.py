"""A region's graph in a compute dtype, as compilers read it and as Python runs it fastest.

A step of generation has operators so small that calling them takes longer than they do. An `OpOverload` is called through
its schema, where torch's function or method of the same name calls the same kernel at once; an operator that is written in
Python goes through Python at every level of the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from vlmbuild.ops.attention_sdpa import sdpa_forward
from vlmbuild.ops.linear_onednn import linear_onednn, suits_onednn
from vlmbuild.ops.mrope import rotate_cpu, rotate_reference
from vlmbuild.program import COMPUTE_DTYPE, Region
from vlmbuild.runtime.compiler import Compiler
from vlmbuild.runtime.compiler import apply as run_compiled

DROPOUT = torch.ops.aten.dropout.default


class BoundGraph:
    """A region's graph with a compute dtype.

    Args:
        region: From a program.
        dtype: Takes the place of `COMPUTE_DTYPE`.
        dropout: Whether to keep its dropout.
        few_rows: Whether compilers are to expect one token a row.
    """

    def __init__(self, region: Region, dtype: torch.dtype, *, dropout: bool = True, few_rows: bool = False) -> None:
        module = aten_module(region, dtype, dropout=dropout)
        self.random = any(node.target is DROPOUT for node in module.graph.nodes)
        self.compiled = few_rows_module(module) if few_rows else module
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


def few_rows_module(module: GraphModule) -> GraphModule:
    """A copy for compilers, of a step that has one token a row."""
    graph = _copy(module)
    for node in graph.nodes:
        node.target = _OF_FEW_ROWS.get(node.target, node.target)
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


def _linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer; on a CPU, a matrix times one vector for each of a few rows. Inductor makes them one loop that reads
    weights as fast as memory gives them, where BLAS libraries are made for more rows."""
    rows = states.flatten(0, -2)
    if states.device.type != "cpu" or len(rows) > _FEW:
        return F.linear(states, weight, bias)
    products = torch.stack([torch.mv(weight, row) for row in rows]).view(*states.shape[:-1], -1)
    return products if bias is None else products + bias


def _rotate(query: Tensor, *rest: Any) -> Any:
    """The rotation; on a CPU as its formula, which inductor fuses."""
    return rotate_reference(query, *rest) if query.device.type == "cpu" else _ROTATE(query, *rest)


def _attention_kernel(query: Tensor, *rest: Any) -> Any:
    return _ATTENTION(query, *rest) if _needs_dispatcher(query) else sdpa_forward(query, *rest)[0]


def _rotation_kernel(query: Tensor, *rest: Any) -> Any:
    return _ROTATE(query, *rest) if _needs_dispatcher(query) else rotate_cpu(query, *rest)


def _linear_kernel(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _needs_dispatcher(states) or not suits_onednn(states, weight):
        return F.linear(states, weight, bias)
    return linear_onednn(states, weight, bias)


def _needs_dispatcher(tensor: Tensor) -> bool:
    """For gradients, another device, or a kind of tensor with rules of its own."""
    return torch.is_grad_enabled() or tensor.device.type != "cpu" or type(tensor) is not Tensor


_ATTENTION, _ROTATE = torch.ops.vlmbuild.attention_auto.default, torch.ops.vlmbuild.mrope_rotate.default
_LINEAR = torch.ops.aten.linear.default
_KERNELS: dict[object, Callable[..., Any]] = {
    _ATTENTION: _attention_kernel,
    _ROTATE: _rotation_kernel,
    _LINEAR: _linear_kernel,
}
_FEW = 4
_OF_FEW_ROWS: dict[object, Callable[..., Any]] = {_LINEAR: _linear, _ROTATE: _rotate}


def _in_python(operator: object) -> tuple[str, Any] | None:
    """The kind of node, and its target, that call an operator without its schema."""
    if kernel := _KERNELS.get(operator):
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

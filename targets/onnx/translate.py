"""From a region's graph to ONNX nodes: one pass over it, each node by the table of its operator."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from vlmbuild.errors import PassError
from vlmbuild.ir.program import COMPUTE_DTYPE
from vlmbuild.targets.onnx.graph_builder import GraphBuilder


@dataclass(frozen=True, slots=True)
class Value:
    """A value of a graph.

    Attributes:
        name: Name in the ONNX graph.
        meta: Tracing's value: a tensor without data, or a symbolic size (then it is an int64 [1] there).
    """

    name: str
    meta: Any

    @property
    def rank(self) -> int:
        """Number of dimensions of a tensor."""
        return len(self.meta.shape)

    def axis(self, dim: int) -> int:
        """Count a dimension from the front."""
        return dim % self.rank

    def static(self, dim: int) -> int | None:
        """Return a size that is the same in every run, else None."""
        size = self.meta.shape[dim]
        return size if isinstance(size, int) else None


@dataclass(frozen=True, slots=True)
class Site:
    """A node that is being translated.

    Attributes:
        builder: Takes the ONNX nodes.
        meta: Tracing's value of the node's result.
    """

    builder: GraphBuilder
    meta: Any

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Resolve a dtype of the program to a real one."""
        return self.builder.compute if dtype == COMPUTE_DTYPE else dtype

    def sizes(self, given: Sequence[Any]) -> list[int | str]:
        """Return the result's sizes: numbers where they never change, -1 for a single other one, else as given."""
        known = [size if isinstance(size, int) else None for size in self.meta.shape]
        if known.count(None) <= 1:
            return [-1 if size is None else size for size in known]
        asked = [size.name if isinstance(size, Value) else size for size in given]
        return [ask if size is None else size for size, ask in zip(known, asked, strict=True)]


Handler = Callable[..., Any]
"""(site, the node's arguments) -> the name of its result, or a tuple of names."""


class Translator:
    """Translates graphs into one ONNX graph, by a table of operators."""

    def __init__(self, builder: GraphBuilder, table: dict[Any, Handler]) -> None:
        self.builder = builder
        self._table = table

    def run(self, graph: Graph, inputs: dict[Node, str], needed: Collection[Node], where: str) -> dict[Node, Any]:
        """Translate the needed nodes of a region's graph: node -> the name of its value, or a tuple of names.

        Raises:
            PassError: An operator has no translation; the message says `where`.
        """
        names: dict[Node, Any] = dict(inputs)
        for node in graph.nodes:
            if node.op == "call_function" and node in needed and node not in names:
                names[node] = self._node(node, names, where)
        return names

    def _node(self, node: Node, names: dict[Node, Any], where: str) -> Any:
        if node.target is operator.getitem:
            source, index = node.args
            return names[source][index]  # type: ignore[index]
        handler = self._table.get(node.target)
        if handler is None:
            raise PassError(
                f"{where}: the operator {node.target} has no translation to ONNX. This is a limit of vlmbuild; report it with "
                "the config.json, or build another target."
            )

        def value(other: Node) -> Any:
            return Value(names[other], other.meta.get("val"))

        arguments: Any = torch.fx.map_arg(node.args, value)
        options: Any = torch.fx.map_arg(dict(node.kwargs), value)
        return handler(Site(self.builder, node.meta.get("val")), *arguments, **options)

"""Pattern rewriting on region graphs; the only module that touches torch.fx's subgraph rewriter.

A rewrite is three functions with the same argument names, in ordinary torch code: what to look for, what to put in its
place, and whether a match may be replaced. Pattern and replacement are exported as the model is and simplified by the
same function, so that they meet the graph in the same form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.fx.passes.utils.matcher_utils import InternalMatch
from torch.fx.subgraph_rewriter import replace_pattern_with_filters

from vlmbuild.rewrite.simplify import simplify


@dataclass(frozen=True, eq=False)
class Rewrite:
    """Pattern and its replacement.

    Attributes:
        pattern: Ordinary torch code over the values that the match binds.
        replacement: The same arguments and the same outputs.
        example: Example tensors (meta device) for tracing; dimensions named in `dynamic` match any size.
        dynamic: Per argument, the dimensions that are dynamic.
        check: Returns None, or the reason why this match must stay; gets the matched nodes of the arguments.
    """

    pattern: Callable[..., Any]
    replacement: Callable[..., Any]
    example: tuple[torch.Tensor, ...]
    dynamic: tuple[dict[int, Any], ...]
    check: Callable[..., str | None] = field(default=lambda *_: None)


def apply(graph_module: GraphModule, rewrite: Rewrite) -> tuple[int, list[str]]:
    """Replace every match in place.

    Returns:
        How many sites were rewritten, and the reasons why others were refused.
    """
    refusals: list[str] = []
    pattern, replacement = _traced(rewrite)
    arguments = [node for node in pattern.nodes if node.op == "placeholder"]

    def accept(match: InternalMatch, _original: Graph, _pattern: Graph) -> bool:
        reason = rewrite.check(*(match.nodes_map[node] for node in arguments))
        if reason is not None:
            refusals.append(reason)
        return reason is None

    replaced = replace_pattern_with_filters(
        graph_module,
        GraphModule(nn.Module(), pattern),
        GraphModule(nn.Module(), replacement),
        match_filters=[accept],
        ignore_literals=False,
    )
    return len(replaced), refusals


def pattern_graph(rewrite: Rewrite) -> Graph:
    """Return a rewrite's pattern as a graph."""
    return _traced(rewrite)[0]


@cache
def _traced(rewrite: Rewrite) -> tuple[Graph, Graph]:
    """Trace pattern and replacement, once for all regions."""
    return tuple(trace(code, rewrite.example, rewrite.dynamic) for code in (rewrite.pattern, rewrite.replacement))  # type: ignore[return-value]


def trace(
    function: Callable[..., Any], example: tuple[torch.Tensor, ...], dynamic: tuple[dict[int, Any], ...]
) -> Graph:
    """Export ordinary torch code to the operators that captured models are made of."""

    class Traced(nn.Module):
        def forward(self, *arguments: torch.Tensor) -> Any:
            return function(*arguments)

    distinct = tuple(torch.empty_like(tensor) for tensor in example)  # export takes one object twice for one input
    exported = torch.export.export(Traced(), distinct, dynamic_shapes=(dynamic,), strict=False)
    module: GraphModule = exported.graph_module
    simplify(module)
    return module.graph

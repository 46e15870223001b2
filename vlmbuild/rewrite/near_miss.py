"""Why a pattern does not match: the site in a graph that comes closest to it, and the first difference there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from vlmbuild.ir.printer import target_name
from vlmbuild.rewrite.pattern import Rewrite, pattern_graph

_CLOSE = 0.5
"""Share of a pattern's nodes that a near miss must have."""


@dataclass(slots=True)
class _Comparison:
    """The pattern nodes that match before one node of a graph, and the first difference."""

    found: int = 0
    difference: str = ""

    def note(self, difference: str) -> None:
        self.difference = self.difference or difference


def near_miss(graph: Graph, rewrites: Iterable[Rewrite]) -> str | None:
    """Describe how the closest site in a graph differs from the closest pattern; None if nothing comes close."""
    best: tuple[float, str] = (0.0, "")
    for rewrite in rewrites:
        pattern = pattern_graph(rewrite)
        for root in _roots(pattern):
            size = len(_computed_inputs(root))
            for node in graph.nodes:
                if node.op == "call_function" and node.target is root.target:
                    comparison = _Comparison()
                    _compare(root, node, comparison, set())
                    if comparison.difference:
                        best = max(best, (comparison.found / size, comparison.difference))
    return best[1] if best[0] >= _CLOSE else None


def _roots(pattern: Graph) -> list[Node]:
    """Return the pattern's results."""
    return [node for node in pattern.output_node().all_input_nodes if node.op == "call_function"]


def _computed_inputs(root: Node) -> set[Node]:
    """Return the computing nodes before a node, and itself."""
    found: set[Node] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node.op == "call_function" and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _compare(pattern: Any, actual: Any, comparison: _Comparison, seen: set[Node]) -> None:
    """Walk both graphs from the results as far as they agree."""
    if isinstance(pattern, Node):
        _compare_nodes(pattern, actual, comparison, seen)
    elif isinstance(pattern, list | tuple) and isinstance(actual, list | tuple):
        for one, other in zip(pattern, actual, strict=False):  # _argument_differences reports another length
            _compare(one, other, comparison, seen)


def _compare_nodes(pattern: Node, actual: Any, comparison: _Comparison, seen: set[Node]) -> None:
    if pattern.op == "placeholder" or pattern in seen:
        return
    if not isinstance(actual, Node):
        comparison.note(f"the graph has a number, the pattern `{_short(pattern)}`")
    elif pattern.target is not actual.target:
        comparison.note(f"the graph has `{_short(actual)}`, the pattern `{_short(pattern)}`")
    elif difference := next(_argument_differences(pattern, actual), ""):
        comparison.note(difference)
    else:
        seen.add(pattern)
        comparison.found += 1
        _compare(pattern.args, actual.args, comparison, seen)


def _argument_differences(pattern: Node, actual: Node) -> Iterator[str]:
    """Compare a call's own arguments: the number of tensors, and its constants."""
    expected, width = _width(pattern), _width(actual)
    if expected != width:
        yield f"`{_short(actual)}` has {width} inputs, the pattern has {expected}"
    if _numbers(pattern) != _numbers(actual):
        yield f"`{_short(actual)}` has the numbers {_numbers(actual)}, the pattern has {_numbers(pattern)}"


def _numbers(node: Node) -> list[Any]:
    return [argument for argument in node.args if not isinstance(argument, Node | list | tuple)]


def _width(node: Node) -> int:
    """Count the tensors that a call takes, including those in lists."""
    return sum(
        len(argument) if isinstance(argument, list | tuple) else isinstance(argument, Node) for argument in node.args
    )


def _short(node: Node) -> str:
    """Shorten a target's name: "aten.cat.default" -> "cat"."""
    parts = target_name(node).split(".")
    return parts[1] if len(parts) > 1 else parts[0]

"""Why a pattern does not match: the place in a graph that comes closest to it, and the first thing that differs there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from vlmbuild.ir.printer import target_name
from vlmbuild.rewrite.pattern import Rewrite, pattern_graph

_CLOSE = 0.5
"""Share of a pattern's nodes that must be there before one speaks of a near miss."""


@dataclass(slots=True)
class _Comparison:
    """Of a pattern with what leads to one node: pattern nodes that are there, and the first difference."""

    found: int = 0
    difference: str = ""

    def note(self, difference: str) -> None:
        self.difference = self.difference or difference


def near_miss(graph: Graph, rewrites: Iterable[Rewrite]) -> str | None:
    """How the closest place in a graph differs from the closest of the patterns; None if nothing comes close."""
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
    """The pattern's results."""
    return [node for node in pattern.output_node().all_input_nodes if node.op == "call_function"]


def _computed_inputs(root: Node) -> set[Node]:
    """The computing nodes that lead to a node, and itself."""
    found: set[Node] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node.op == "call_function" and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _compare(pattern: Any, actual: Any, comparison: _Comparison, seen: set[Node]) -> None:
    """Go down both graphs from the results as far as they agree."""
    if isinstance(pattern, Node):
        _compare_nodes(pattern, actual, comparison, seen)
    elif isinstance(pattern, list | tuple) and isinstance(actual, list | tuple):
        for one, other in zip(pattern, actual, strict=False):
            _compare(one, other, comparison, seen)


def _compare_nodes(pattern: Node, actual: Any, comparison: _Comparison, seen: set[Node]) -> None:
    if pattern.op == "placeholder" or pattern in seen:
        return
    if not isinstance(actual, Node):
        comparison.note(f"a number stands where the pattern has `{_short(pattern)}`")
    elif pattern.target is not actual.target:
        comparison.note(f"`{_short(actual)}` stands where the pattern has `{_short(pattern)}`")
    elif difference := next(_argument_differences(pattern, actual), ""):
        comparison.note(difference)
    else:
        seen.add(pattern)
        comparison.found += 1
        _compare(pattern.args, actual.args, comparison, seen)


def _argument_differences(pattern: Node, actual: Node) -> Iterator[str]:
    """What differs in a call's own arguments: how many tensors it takes, and its numbers."""
    wanted, found = _width(pattern), _width(actual)
    if wanted != found:
        yield f"`{_short(actual)}` has {found} inputs, the pattern has {wanted}"
    if _numbers(pattern) != _numbers(actual):
        yield f"`{_short(actual)}` has the numbers {_numbers(actual)}, the pattern has {_numbers(pattern)}"


def _numbers(node: Node) -> list[Any]:
    return [argument for argument in node.args if not isinstance(argument, Node | list | tuple)]


def _width(node: Node) -> int:
    """How many tensors a call takes, those of lists one by one."""
    return sum(
        len(argument) if isinstance(argument, list | tuple) else isinstance(argument, Node) for argument in node.args
    )


def _short(node: Node) -> str:
    """ "cat" of "aten.cat.default"."""
    parts = target_name(node).split(".")
    return parts[1] if len(parts) > 1 else parts[0]

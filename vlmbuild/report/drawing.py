"""A region's graph as inline SVG: layers by longest path, nodes sorted by where their inputs stand, curves between."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vlmbuild.report.graph_view import ViewNode

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 148, 34, 16, 22, 12
_SWEEPS = 4


def draw(nodes: Sequence[ViewNode], title: str, changed: frozenset[str] = frozenset()) -> str:
    """SVG of a graph.

    Args:
        nodes: In dataflow order.
        title: For those who hear it.
        changed: Ids of nodes to mark.
    """
    places = layout(nodes)
    width = max(x for x, _ in places.values()) + _WIDTH + _MARGIN
    height = max(y for _, y in places.values()) + _HEIGHT + _MARGIN
    edges = [_edge(places[source], places[node.id]) for node in nodes for source in node.inputs]
    boxes = [_box(node, places[node.id], node.id in changed) for node in nodes]
    label = escape(f"Graph of {title}: {len(nodes)} nodes")
    opening = f'<svg class="graph" role="group" aria-label="{label}" viewBox="0 0 {width:.0f} {height:.0f}" '
    return f'{opening}width="{width:.0f}" height="{height:.0f}">{"".join(edges)}{"".join(boxes)}</svg>'


def layout(nodes: Sequence[ViewNode]) -> dict[str, tuple[float, float]]:
    """Left upper corner of every node; inputs stand above what reads them."""
    rank = _ranks(nodes)
    layers: dict[int, list[str]] = {}
    for node in nodes:
        layers.setdefault(rank[node.id], []).append(node.id)
    _sort_layers(nodes, layers)
    widest = max(map(len, layers.values()))
    places: dict[str, tuple[float, float]] = {}
    for depth, layer in layers.items():
        left = _MARGIN + (widest - len(layer)) * (_WIDTH + _GAP_X) / 2
        for index, name in enumerate(layer):
            places[name] = (left + index * (_WIDTH + _GAP_X), _MARGIN + depth * (_HEIGHT + _GAP_Y))
    return places


def _ranks(nodes: Sequence[ViewNode]) -> dict[str, int]:
    """Longest path from an input; inputs stand right above their first reader."""
    rank: dict[str, int] = {}
    for node in nodes:
        rank[node.id] = 1 + max((rank[source] for source in node.inputs), default=-1)
    readers: dict[str, list[str]] = {}
    for node in nodes:
        for source in node.inputs:
            readers.setdefault(source, []).append(node.id)
    for node in nodes:
        if not node.inputs and node.id in readers:
            rank[node.id] = max(0, min(rank[reader] for reader in readers[node.id]) - 1)
    return rank


def _sort_layers(nodes: Sequence[ViewNode], layers: dict[int, list[str]]) -> None:
    """Put every node near the mean place of its neighbours, downwards and upwards in turn."""
    inputs = {node.id: list(node.inputs) for node in nodes}
    readers: dict[str, list[str]] = {node.id: [] for node in nodes}
    for node in nodes:
        for source in node.inputs:
            readers[source].append(node.id)
    for sweep in range(_SWEEPS):
        neighbours = readers if sweep % 2 else inputs
        for depth in sorted(layers, reverse=bool(sweep % 2)):
            place = {name: index - len(layer) / 2 for layer in layers.values() for index, name in enumerate(layer)}
            means = {
                name: sum(place[other] for other in neighbours[name]) / len(neighbours[name])
                if neighbours[name]
                else place[name]
                for name in layers[depth]
            }
            layers[depth].sort(key=means.__getitem__)


def _edge(start: tuple[float, float], end: tuple[float, float]) -> str:
    x1, y1, x2, y2 = start[0] + _WIDTH / 2, start[1] + _HEIGHT, end[0] + _WIDTH / 2, end[1]
    middle = (y1 + y2) / 2
    return f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"/>'


def _box(node: ViewNode, place: tuple[float, float], changed: bool) -> str:
    x, y = place
    kind = "edge" if not node.operator else "ours" if node.operator.startswith("vlmbuild") else "aten"
    said = ", ".join(part for part in (node.operator or node.label, node.type, *node.weights) if part)
    under = node.weights[0].removesuffix(".weight") if node.weights else node.type
    return (
        f'<g class="node {kind}{" changed" if changed else ""}" tabindex="0" role="img" aria-label="{escape(said)}">'
        f"<title>{escape(said)}</title>"
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{_WIDTH}" height="{_HEIGHT}" rx="5"/>'
        f'<text class="name" x="{x + _WIDTH / 2:.0f}" y="{y + 14:.0f}">{escape(node.label)}</text>'
        f'<text class="type" x="{x + _WIDTH / 2:.0f}" y="{y + 27:.0f}">{escape(_cut(under))}</text></g>'
    )


def _cut(text: str, most: int = 23) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"

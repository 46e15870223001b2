"""Graphs as files of other tools: Graphviz DOT, which Netron opens too, and Model Explorer's JSON.

DOT holds one digraph with a cluster for each region. Model Explorer takes `graphs`, each a list of nodes with an id, a
label, a namespace, attributes and incoming edges; every region is a graph of its own there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from vlmbuild.ir.program import Program, Region
from vlmbuild.report.graph_view import ViewNode, view_nodes


def to_dot(program: Program) -> str:
    """A DOT digraph of all regions."""
    return "\n".join(_dot_lines(program)) + "\n"


def _dot_lines(program: Program) -> Iterator[str]:
    yield f"digraph {json.dumps(program.family)} {{"
    yield "  rankdir=TB; node [shape=box, fontname=Helvetica, fontsize=10];"
    for number, region in enumerate(program.regions.values()):
        yield f"  subgraph cluster_{number} {{"
        yield f"    label={json.dumps(_title(region))};"
        for node in view_nodes(region):
            label = "\\n".join(_escaped(part) for part in (node.label, node.type, *node.weights) if part)
            yield f'    "{number}_{node.id}" [label="{label}"];'
        for node in view_nodes(region):
            for source in node.inputs:
                yield f'    "{number}_{source}" -> "{number}_{node.id}";'
        yield "  }"
    yield "}"


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def to_model_explorer(program: Program) -> dict[str, Any]:
    """Plain values of Model Explorer's graph file."""
    return {
        "graphs": [
            {"id": _title(region), "nodes": [_explorer_node(node, name) for node in view_nodes(region)]}
            for name, region in program.regions.items()
        ]
    }


def _explorer_node(node: ViewNode, region: str) -> dict[str, Any]:
    attributes = {"operator": node.operator, "type": node.type, "weights": ", ".join(node.weights)}
    namespace = [part for weight in node.weights[:1] for part in weight.split(".")[:-1]]
    return {
        "id": node.id,
        "label": node.label,
        "namespace": "/".join([*region.split("."), *namespace]),
        "attrs": [{"key": key, "value": value} for key, value in attributes.items() if value],
        "incomingEdges": [
            {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(place)}
            for place, source in enumerate(node.inputs)
        ],
    }


def _title(region: Region) -> str:
    many = len(region.instances)
    return f"{region.name} x {many}" if many > 1 else region.name

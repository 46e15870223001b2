"""Graphs as files for other tools: Graphviz DOT, which Netron opens too, and the JSON of Model Explorer.

Netron reads nodes and edges of the top level only, and takes the name of an operator from labels as torch's own drawer
writes them: `{id|op_code=call_function\\l|operator\\lkey: value\\l}`. So nodes are listed there, and clusters only name
them. Model Explorer takes a collection, `label` and `graphs`; each region is one graph.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vlmbuild.ir.dims import size_text
from vlmbuild.ir.printer import dataflow_order, short_dtype, target_name
from vlmbuild.ir.program import Program, Region


@dataclass(frozen=True, slots=True)
class ViewNode:
    """A node of a graph file.

    Attributes:
        id: Unique in its graph: "in0", "n7", "out".
        label: Short name of the operator: "linear".
        operator: Full name: "aten.linear.default"; "" for inputs and results.
        type: "compute[1, sequence, 1536]", or "".
        weights: Names of the slots that it reads.
        inputs: Ids of the nodes that it reads, in order.
    """

    id: str
    label: str
    operator: str
    type: str
    weights: tuple[str, ...]
    inputs: tuple[str, ...]


def view_nodes(region: Region) -> tuple[ViewNode, ...]:
    """List activations, operators in dataflow order, and the result. Weights are attributes of their readers; sizes are
    left out."""
    slots = region.slot_nodes()
    nodes: list[ViewNode] = []
    ids: dict[Node, str] = {}
    for index, node in enumerate(region.placeholders()[len(region.slots) :]):
        ids[node] = f"in{index}"
        nodes.append(ViewNode(ids[node], f"in{index}", "", _type(node, region), (), ()))
    for number, node in enumerate(dataflow_order(region)):
        if node.target is torch.ops.aten.sym_size.int:
            continue
        ids[node] = f"n{number}"
        inputs = tuple(ids[other] for other in node.all_input_nodes if other in ids)
        weights = tuple(slots[other].name for other in node.all_input_nodes if other in slots)
        name = target_name(node)
        nodes.append(ViewNode(ids[node], short_name(name), name, _type(node, region), weights, inputs))
    results = tuple(ids[node] for node in region.results() if node in ids)
    return (*nodes, ViewNode("out", "return", "", "", (), results))


def short_name(operator: str) -> str:
    """Shorten "aten.linear.default" to "linear"."""
    parts = operator.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def _type(node: Node, region: Region) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    sizes = ", ".join(size_text(size, region.dimensions) for size in value.shape)
    return f"{short_dtype(value.dtype)}[{sizes}]"


def to_dot(program: Program) -> str:
    """Return a DOT digraph of all regions, one cluster each."""
    return "\n".join(_dot_lines(program)) + "\n"


def _dot_lines(program: Program) -> Iterator[str]:
    yield f"digraph {json.dumps(program.family)} {{"
    yield "  rankdir=TB; node [shape=record, fontname=Helvetica, fontsize=10];"
    for number, region in enumerate(program.regions.values()):
        nodes = view_nodes(region)
        for node in nodes:
            yield f'  "{number}_{node.id}" [label="{_record(node, f"{number}_{node.id}")}"];'
        for node in nodes:
            for source in node.inputs:
                yield f'  "{number}_{source}" -> "{number}_{node.id}";'
        yield f"  subgraph cluster_{number} {{"
        yield f"    label={json.dumps(_title(region))};"
        yield from (f'    "{number}_{node.id}";' for node in nodes)
        yield "  }"
    yield "}"


def _record(node: ViewNode, name: str) -> str:
    facts = [("type", node.type), *(("weight", weight) for weight in node.weights)]
    lines = [node.operator or node.label, *(f"{key}: {value}" for key, value in facts if value)]
    return f"{{{name}|op_code=call_function\\l|{''.join(_escaped(line) + chr(92) + 'l' for line in lines)}}}"


def _escaped(text: str) -> str:
    """Escape the marks of a record label."""
    return re.sub(r'([{}|<>"\\])', r"\\\1", text)


def to_model_explorer(program: Program) -> dict[str, Any]:
    """Return the plain values of a Model Explorer file."""
    return {
        "label": program.family,
        "graphs": [
            {"id": _title(region), "nodes": [_explorer_node(node, name) for node in view_nodes(region)]}
            for name, region in program.regions.items()
        ],
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
            {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(index)}
            for index, source in enumerate(node.inputs)
        ],
    }


def _title(region: Region) -> str:
    many = len(region.instances)
    return f"{region.name} x {many}" if many > 1 else region.name

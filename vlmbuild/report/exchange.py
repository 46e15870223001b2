"""Graphs as files for other tools: the JSON of Model Explorer, and Graphviz DOT, which Netron opens too.

Model Explorer takes a collection, `label` and `graphs`; each region is one graph. Netron reads nodes and edges of the top
level only, and takes the name of an operator from labels as torch's own drawer writes them:
`{id|op_code=call_function\\l|operator\\lkey: value\\l}`. So nodes are listed there, and clusters only name them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.fx import Node

from vlmbuild.ir.dims import size_text
from vlmbuild.ir.printer import dataflow_order, short_dtype, target_name
from vlmbuild.ir.program import Program, Region


def to_model_explorer(program: Program) -> dict[str, Any]:
    """Return the plain values of a Model Explorer file."""
    graphs = [{"id": _title(region), "nodes": list(_nodes(region))} for region in program.regions.values()]
    return {"label": program.family, "graphs": graphs}


def to_dot(program: Program) -> str:
    """Return a DOT digraph of all regions, one cluster each."""
    return "\n".join(_dot_lines(to_model_explorer(program))) + "\n"


def _nodes(region: Region) -> Iterator[dict[str, Any]]:
    """Yield activations, operators in dataflow order, and the result. Weights are attributes of their readers; sizes are
    left out."""
    slots = region.slot_nodes()
    ids: dict[Node, str] = {}
    for index, node in enumerate(region.placeholders()[len(region.slots) :]):
        ids[node] = f"in{index}"
        yield _node(region, ids[node], ids[node], (), {"type": _type(node, region)})
    for number, node in enumerate(dataflow_order(region)):
        if node.target is torch.ops.aten.sym_size.int:
            continue
        ids[node] = f"n{number}"
        operator = target_name(node)  # "aten.linear.default"
        weights = [slots[other].name for other in node.all_input_nodes if other in slots]
        facts = {"operator": operator, "type": _type(node, region), "weights": ", ".join(weights)}
        inputs = [ids[other] for other in node.all_input_nodes if other in ids]
        module = weights[0].split(".")[:-1] if weights else ()
        label = operator.split(".")[1] if "." in operator else operator
        yield _node(region, ids[node], label, inputs, facts, module)
    yield _node(region, "out", "return", [ids[node] for node in region.results() if node in ids], {})


def _node(
    region: Region, name: str, label: str, inputs: Iterable[str], facts: Mapping[str, str], module: Iterable[str] = ()
) -> dict[str, Any]:
    return {
        "id": name,
        "label": label,
        "namespace": "/".join([*region.name.split("."), *module]),
        "attrs": [{"key": key, "value": value} for key, value in facts.items() if value],
        "incomingEdges": [
            {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(index)}
            for index, source in enumerate(inputs)
        ],
    }


def _type(node: Node, region: Region) -> str:
    """Return "bf16[1, sequence, 1536]"; "" for a node that is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    sizes = ", ".join(size_text(size, region.dimensions) for size in value.shape)
    return f"{short_dtype(value.dtype)}[{sizes}]"


def _title(region: Region) -> str:
    many = len(region.instances)
    return f"{region.name} x {many}" if many > 1 else region.name


def _dot_lines(document: Mapping[str, Any]) -> Iterator[str]:
    yield f"digraph {json.dumps(document['label'])} {{"
    yield "  rankdir=TB; node [shape=record, fontname=Helvetica, fontsize=10];"
    for number, graph in enumerate(document["graphs"]):
        names = {node["id"]: f"{number}_{node['id']}" for node in graph["nodes"]}
        for node in graph["nodes"]:
            yield f'  "{names[node["id"]]}" [label="{_record(node, names[node["id"]])}"];'
        for node in graph["nodes"]:
            for edge in node["incomingEdges"]:
                yield f'  "{names[edge["sourceNodeId"]]}" -> "{names[node["id"]]}";'
        yield f"  subgraph cluster_{number} {{"
        yield f"    label={json.dumps(graph['id'])};"
        yield from (f'    "{name}";' for name in names.values())
        yield "  }"
    yield "}"


def _record(node: Mapping[str, Any], name: str) -> str:
    facts = {pair["key"]: pair["value"] for pair in node["attrs"]}
    lines = [facts.pop("operator", node["label"]), *(f"{key}: {value}" for key, value in facts.items())]
    escaped = (re.sub(r'([{}|<>"\\])', r"\\\1", line) for line in lines)
    return f"{{{name}|op_code=call_function\\l|{''.join(line + chr(92) + 'l' for line in escaped)}}}"

"""A region's graph as nodes and edges to draw: what viewers, files and pages have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from vlmbuild.ir.printer import dataflow_order, dtype_name, size_text, target_name
from vlmbuild.ir.program import Region


@dataclass(frozen=True, slots=True)
class ViewNode:
    """A node to draw.

    Attributes:
        id: Unique in its graph: "in0", "n7", "out".
        label: What it does, short: "linear".
        operator: In full: "aten.linear.default"; "" for inputs and results.
        type: "compute[1, sequence, 1536]", or "".
        weights: Slots that it reads.
        inputs: Ids of the nodes whose values it reads, in order.
    """

    id: str
    label: str
    operator: str
    type: str
    weights: tuple[str, ...]
    inputs: tuple[str, ...]


def view_nodes(region: Region) -> tuple[ViewNode, ...]:
    """Activations, operators in dataflow order, and the result; weights stand at the operators that read them, and sizes
    are left out."""
    slots = region.slot_nodes()
    nodes: list[ViewNode] = []
    ids: dict[Node, str] = {}
    for place, node in enumerate(region.placeholders()[len(region.slots) :]):
        ids[node] = f"in{place}"
        nodes.append(ViewNode(ids[node], f"in{place}", "", _type(node, region), (), ()))
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
    """ "linear" of "aten.linear.default"."""
    parts = operator.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def _type(node: Node, region: Region) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    sizes = ", ".join(size_text(size, region.dimensions) for size in value.shape)
    return f"{dtype_name(value.dtype)}[{sizes}]"

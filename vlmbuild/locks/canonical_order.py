"""A program in canonical order: slots by name, activations by first use, whatever order tracing happened to see them in.

Nodes need no order: `vlmbuild.ir.printer` lists them by dataflow. With both, a renamed or reordered graph is the same text.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace

from torch.fx import Node

from vlmbuild.ir.printer import dataflow_order
from vlmbuild.ir.program import Program, Region


def canonical(program: Program) -> Program:
    """A copy whose slots and activations stand in canonical order; calls are changed to fit."""
    ordered = copy.deepcopy(program)
    places = {name: _reorder(region) for name, region in ordered.regions.items()}
    for name, variant in ordered.variants.items():
        calls = tuple(
            replace(call, inputs=tuple(call.inputs[place] for place in places[call.region])) for call in variant.calls
        )
        ordered.variants[name] = replace(variant, calls=calls)
    return ordered


def _reorder(region: Region) -> list[int]:
    """Put a region's placeholders in canonical order; returns the former place of each activation."""
    placeholders = region.placeholders()
    count = len(region.slots)
    by_name = sorted(range(count), key=lambda place: _natural(region.slots[place].name))
    first_use = _first_uses(region)
    activations = placeholders[count:]
    by_use = sorted(range(len(activations)), key=lambda place: first_use.get(activations[place], len(first_use)))
    for node in [*(placeholders[place] for place in by_name), *(activations[place] for place in by_use)]:
        anchor = next(other for other in region.graph.graph.nodes if other.op != "placeholder")
        anchor.prepend(node)
    region.slots = tuple(region.slots[place] for place in by_name)
    region.activations = tuple(region.activations[place] for place in by_use)
    return by_use


def _first_uses(region: Region) -> dict[Node, int]:
    """Rank of each placeholder by its first use in dataflow order."""
    ranks: dict[Node, int] = {}
    for node in [*dataflow_order(region), region.graph.graph.output_node()]:
        for other in node.all_input_nodes:
            if other.op == "placeholder":
                ranks.setdefault(other, len(ranks))
    return ranks


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key with numbers by value: "blocks.10" after "blocks.9"."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]

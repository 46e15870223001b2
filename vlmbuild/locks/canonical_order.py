"""Canonical order of a program: slots by name, activations by first use, independent of the order of tracing.

`vlmbuild.ir.printer` lists nodes by dataflow, so a renamed or reordered graph gives the same text.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace

from torch.fx import Node

from vlmbuild.ir.printer import dataflow_order
from vlmbuild.ir.program import Program, Region


def canonical(program: Program) -> Program:
    """Copy a program with slots and activations in canonical order, and reorder the inputs of calls."""
    ordered = copy.deepcopy(program)
    positions = {name: _reorder(region) for name, region in ordered.regions.items()}
    for name, variant in ordered.variants.items():
        calls = tuple(
            replace(call, inputs=tuple(call.inputs[index] for index in positions[call.region]))
            for call in variant.calls
        )
        ordered.variants[name] = replace(variant, calls=calls)
    return ordered


def _reorder(region: Region) -> list[int]:
    """Put a region's placeholders in canonical order; return the former index of each activation."""
    placeholders = region.placeholders()
    count = len(region.slots)
    by_name = sorted(range(count), key=lambda index: _natural(region.slots[index].name))
    first_use = _first_uses(region)
    activations = placeholders[count:]
    by_use = sorted(range(len(activations)), key=lambda index: first_use.get(activations[index], len(first_use)))
    for node in [*(placeholders[index] for index in by_name), *(activations[index] for index in by_use)]:
        anchor = next(other for other in region.graph.graph.nodes if other.op != "placeholder")
        anchor.prepend(node)
    region.slots = tuple(region.slots[index] for index in by_name)
    region.activations = tuple(region.activations[index] for index in by_use)
    return by_use


def _first_uses(region: Region) -> dict[Node, int]:
    """Rank placeholders by their first use in dataflow order."""
    ranks: dict[Node, int] = {}
    for node in [*dataflow_order(region), region.graph.graph.output_node()]:
        for other in node.all_input_nodes:
            if other.op == "placeholder":
                ranks.setdefault(other, len(ranks))
    return ranks


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort numbers by value: "blocks.10" after "blocks.9"."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]

"""Split a region whose instances are to get different graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import nn
from torch.fx import Graph, GraphModule, Node

from vlmbuild.ir.program import Program, Region

K = TypeVar("K", bound=Hashable)


def split_by(program: Program, name: str, key: Callable[[str], K]) -> list[tuple[Region, K]]:
    """Split a region by the key of each instance's name; returns the parts with their keys, in the order of their first
    instances. A region with one key stays whole."""
    groups: dict[K, list[str]] = {}
    for instance in program.regions[name].instances:
        groups.setdefault(key(instance), []).append(instance)
    parts = [program.regions[name]] if len(groups) == 1 else split_region(program, name, list(groups.values()))
    return list(zip(parts, groups, strict=True))


def split_region(program: Program, name: str, groups: Sequence[Sequence[str]]) -> list[Region]:
    """Give every group of a region's instances its own region; returns them in the order of the groups.

    The largest group keeps the region and its name; the others get copies, named `name/2`, `name/3`, ... in order. Every
    instance must be in exactly one group.
    """
    region = program.regions[name]
    assert sorted(instance for group in groups for instance in group) == sorted(region.instances)
    largest = max(groups, key=len)
    others = [group for group in groups if group is not largest]
    numbered = {id(group): number for number, group in enumerate(others, 2)}
    parts = []
    for group in groups:
        if group is largest:
            parts.append(region)
        else:
            parts.append(_copied(region, f"{name}/{numbered[id(group)]}", tuple(group)))
    region.instances = tuple(largest)
    owners = {instance: part.name for part in parts for instance in part.instances}
    program.regions = _placed(program.regions, name, parts)
    for variant_name, variant in program.variants.items():
        calls = tuple(
            replace(call, region=owners[call.instance]) if call.region == name else call for call in variant.calls
        )
        program.variants[variant_name] = replace(variant, calls=calls)
    return parts


def _placed(regions: dict[str, Region], name: str, parts: list[Region]) -> dict[str, Region]:
    """Put the parts of one region in its place, the region itself first."""
    parts = sorted(parts, key=lambda part: part.name != name)
    placed: dict[str, Region] = {}
    for other in regions.values():
        placed.update({part.name: part for part in (parts if other.name == name else [other])})
    return placed


def _copied(region: Region, name: str, instances: tuple[str, ...]) -> Region:
    graph = Graph()
    values: dict[Node, Node] = {}
    results = graph.graph_copy(region.graph.graph, values)
    graph.output(results)
    module = GraphModule(nn.Module(), graph, class_name="Region")
    return Region(name, module, region.slots, instances, region.activations, region.recipes, dict(region.dimensions))

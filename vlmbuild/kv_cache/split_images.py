"""Split a program's image variant into the part that depends on images alone, and the part that tokens need.

Before: v9 = layers.cross_attn(v8, features, tiles)            keys and values of the features, and attention to them
After:  key, value = layers.cross_attn.images(features)        once for a set of images
        v9 = layers.cross_attn.tokens(v8, tiles, key, value)   for every token

Legal because the nodes are the same and in the same order; none of the first part reads a token. A node that reads weights
alone stays with its readers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from vlmbuild.ir.dims import Shape
from vlmbuild.ir.printer import dataflow_order
from vlmbuild.ir.program import Call, Program, Region, needed_nodes

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class SplitRegion:
    """A region's two parts, and the nodes of the whole whose values pass from the first to the second.

    Attributes:
        images: Reads images alone.
        tokens: Reads the rest of the whole's activations, and then the passed values.
        crossing: Results of the first part, as nodes of the whole.
        passed: The crossing nodes that the second part reads.
        image_inputs, token_inputs: Indices of the whole's activations that each part reads.
    """

    images: Region
    tokens: Region
    crossing: tuple[Node, ...]
    passed: tuple[Node, ...]
    image_inputs: tuple[int, ...]
    token_inputs: tuple[int, ...]


def split_images(program: Program) -> tuple[Program, dict[str, frozenset[str]]]:
    """Split the regions that read both tokens and images, where they compute something from the images alone.

    Returns:
        A program that shares the regions which stay whole, and for every variant the names of the values that depend on
        images alone, inputs included.
    """
    split = Program(program.family, program.geometry, {}, {}, program.ties)
    splits: dict[tuple[str, frozenset[int]], SplitRegion | None] = {}
    images = {}
    for name, variant in program.variants.items():
        image_values = {entry.name for entry in variant.inputs if not entry.is_about_tokens()}
        calls: list[Call] = []
        for call in variant.calls:
            for region, part in _split_call(program.regions[call.region], call, image_values, splits):
                split.regions[region.name] = region
                calls.append(part)
                image_values |= set(part.outputs if image_values.issuperset(part.inputs) else ())
        split.variants[name] = replace(variant, calls=tuple(calls))
        images[name] = frozenset(image_values)
    return split, images


def _split_call(
    region: Region, call: Call, image_values: set[str], splits: dict[tuple[str, frozenset[int]], SplitRegion | None]
) -> list[tuple[Region, Call]]:
    """Return the call, or the calls of its region's parts."""
    key = (region.name, frozenset(index for index, name in enumerate(call.inputs) if name in image_values))
    if key not in splits:
        splits[key] = split_region(region, key[1])
    split = splits[key]
    if split is None:
        return [(region, call)]
    return list(zip((split.images, split.tokens), _calls(call, region, split), strict=True))


def split_region(region: Region, image_inputs: frozenset[int]) -> SplitRegion | None:
    """Split a region whose activations at these indices depend on images; None if nothing, or everything, that it computes
    does."""
    activations = region.placeholders()[len(region.slots) :]
    if not 0 < len(image_inputs) < len(activations):
        return None
    first = dict.fromkeys(_image_nodes(region, {activations[index] for index in image_inputs}, set(activations)))
    readers = {node: [user for user in node.users if user not in first] for node in first}
    crossing = tuple(node for node, users in readers.items() if users and not _is_size(node))
    if not crossing:
        return None
    rest = tuple(node for node in region.results() if node not in crossing)
    before = _part(region, f"{region.name}.images", crossing, ())
    passed = tuple(node for node in crossing if any(user.op != "output" for user in readers[node]))
    after = _part(region, f"{region.name}.tokens", rest, passed)
    return SplitRegion(before[0], after[0], crossing, passed, before[1], after[1])


def _image_nodes(region: Region, images: set[Node], activations: set[Node]) -> Iterator[Node]:
    """Yield the nodes that depend on an activation of images, and on none of tokens."""
    sources: dict[Node, set[Node]] = {}
    for node in (*region.placeholders(), *dataflow_order(region)):  # a stored program has the same order
        if node.op == "placeholder":
            sources[node] = {node} & activations
        elif node.op == "call_function":
            sources[node] = set().union(*(sources[other] for other in node.all_input_nodes))
            if sources[node] and sources[node] <= images:
                yield node


def _is_size(node: Node) -> bool:
    return node.target is aten.sym_size.int


def _part(
    region: Region, name: str, results: tuple[Node, ...], passed: tuple[Node, ...]
) -> tuple[Region, tuple[int, ...]]:
    """Copy the part of a region that computes these results from activations and passed values; returns it with the indices
    of the activations that it reads."""
    needed = needed_nodes(results, set(passed))
    graph = Graph()
    values: dict[Node, Node] = {}
    count = len(region.slots)
    slot_nodes, activations = region.placeholders()[:count], region.placeholders()[count:]
    slots = [index for index, node in enumerate(slot_nodes) if node in needed]
    read = tuple(index for index, node in enumerate(activations) if node in needed)
    for node in (*(slot_nodes[i] for i in slots), *(activations[i] for i in read), *passed):
        values[node] = graph.placeholder(node.name)
        values[node].meta = dict(node.meta)
    for node in region.graph.graph.nodes:
        if node in needed and node not in values:
            values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in results))
    kept = tuple(region.slots[index] for index in slots)
    names = {slot.name for slot in kept}
    recipes = tuple(recipe for recipe in region.recipes if recipe.source in names)
    shapes: tuple[Shape, ...] = tuple(region.activations[index] for index in read) + ((),) * len(passed)
    module = GraphModule(nn.Module(), graph, class_name="Region")
    return Region(name, module, kept, region.instances, shapes, recipes, dict(region.dimensions)), read


def _calls(call: Call, region: Region, split: SplitRegion) -> tuple[Call, Call]:
    """Return the calls of the two parts, in place of the call of the whole."""
    names = dict(zip(region.results(), call.outputs, strict=True))
    base = call.outputs[0].partition(".")[0]
    for number, node in enumerate(split.crossing):
        names.setdefault(node, f"{base}.image{number}")
    crossing = tuple(names[node] for node in split.crossing)
    first = Call(split.images.name, call.instance, tuple(call.inputs[i] for i in split.image_inputs), crossing)
    inputs = (*(call.inputs[index] for index in split.token_inputs), *(names[node] for node in split.passed))
    rest = tuple(name for name in call.outputs if name not in crossing)
    return first, Call(split.tokens.name, call.instance, inputs, rest)

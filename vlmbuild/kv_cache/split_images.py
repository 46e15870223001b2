"""Divide a program's image variant into what follows from the images alone, and what the tokens need.

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
class Divided:
    """A region's two parts, and which nodes of the whole cross from the first to the second.

    Attributes:
        images: Reads nothing but what follows from images; None if that is nothing new.
        tokens: The rest; its activations are those of the whole that it reads, and then the crossing values.
        crossing: Results of the first part, as nodes of the whole.
        given: Those of them that the second part reads.
        image_inputs, token_inputs: Places of the whole's activations that each part reads.
    """

    images: Region
    tokens: Region
    crossing: tuple[Node, ...]
    given: tuple[Node, ...]
    image_inputs: tuple[int, ...]
    token_inputs: tuple[int, ...]


def divide_images(program: Program) -> tuple[Program, dict[str, frozenset[str]]]:
    """Divide the regions that read both tokens and images, where they compute something of the images alone.

    Returns:
        A program that shares the regions which are not divided, and for every variant the names of the values that follow
        from images alone, inputs included.
    """
    divided = Program(program.family, program.geometry, {}, {}, program.ties)
    parts: dict[tuple[str, frozenset[int]], Divided | None] = {}
    images = {}
    for name, variant in program.variants.items():
        still = {entry.name for entry in variant.inputs if not entry.is_about_tokens()}
        calls: list[Call] = []
        for call in variant.calls:
            line = _divide_call(program.regions[call.region], call, still, parts)
            for region, part in line:
                divided.regions[region.name] = region
                calls.append(part)
                still |= set(part.outputs if still.issuperset(part.inputs) else ())
        divided.variants[name] = replace(variant, calls=tuple(calls))
        images[name] = frozenset(still)
    return divided, images


def _divide_call(
    region: Region, call: Call, still: set[str], parts: dict[tuple[str, frozenset[int]], Divided | None]
) -> list[tuple[Region, Call]]:
    """The call, or the calls of its region's parts."""
    key = (region.name, frozenset(place for place, name in enumerate(call.inputs) if name in still))
    if key not in parts:
        parts[key] = divide_region(region, key[1])
    divided = parts[key]
    if divided is None:
        return [(region, call)]
    return list(zip((divided.images, divided.tokens), _calls(call, region, divided), strict=True))


def divide_region(region: Region, places: frozenset[int]) -> Divided | None:
    """Divide a region whose activations at `places` follow from images; None if nothing, or all, that it computes does."""
    activations = region.placeholders()[len(region.slots) :]
    if not 0 < len(places) < len(activations):
        return None
    whole = dict.fromkeys(_follow(region, {activations[place] for place in places}, set(activations)))
    readers = {node: [user for user in node.users if user not in whole] for node in whole}
    crossing = tuple(node for node, users in readers.items() if users and not _is_size(node))
    if not crossing:
        return None
    rest = tuple(node for node in region.results() if node not in crossing)
    before = _copied(region, f"{region.name}.images", crossing, ())
    given = tuple(node for node in crossing if any(user.op != "output" for user in readers[node]))
    after = _copied(region, f"{region.name}.tokens", rest, given)
    return Divided(before[0], after[0], crossing, given, before[1], after[1])


def _follow(region: Region, images: set[Node], activations: set[Node]) -> Iterator[Node]:
    """The nodes that read an activation of images, and none of tokens, however far back."""
    sources: dict[Node, set[Node]] = {}
    for node in (*region.placeholders(), *dataflow_order(region)):  # the same of a program that was stored
        if node.op == "placeholder":
            sources[node] = {node} & activations
        elif node.op == "call_function":
            sources[node] = set().union(*(sources[other] for other in node.all_input_nodes))
            if sources[node] and sources[node] <= images:
                yield node


def _is_size(node: Node) -> bool:
    return node.target is aten.sym_size.int


def _copied(
    region: Region, name: str, results: tuple[Node, ...], given: tuple[Node, ...]
) -> tuple[Region, tuple[int, ...]]:
    """The part of a region that makes these results from activations and from given values, and the places of the
    activations that it reads."""
    needed = needed_nodes(results, set(given))
    graph = Graph()
    values: dict[Node, Node] = {}
    placeholders = region.placeholders()
    slots = [place for place, _ in enumerate(region.slots) if placeholders[place] in needed]
    count = len(region.slots)
    read = tuple(place for place in range(len(placeholders) - count) if placeholders[count + place] in needed)
    for node in (*(placeholders[p] for p in slots), *(placeholders[count + p] for p in read), *given):
        values[node] = graph.placeholder(node.name)
        values[node].meta = dict(node.meta)
    for node in region.graph.graph.nodes:
        if node in needed and node not in values:
            values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in results))
    kept = tuple(region.slots[place] for place in slots)
    names = {slot.name for slot in kept}
    recipes = tuple(recipe for recipe in region.recipes if recipe.source in names)
    shapes: tuple[Shape, ...] = tuple(region.activations[place] for place in read) + ((),) * len(given)
    module = GraphModule(nn.Module(), graph, class_name="Region")
    return Region(name, module, kept, region.instances, shapes, recipes, dict(region.dimensions)), read


def _calls(call: Call, region: Region, divided: Divided) -> tuple[Call, Call]:
    """Of the two parts, in place of the call of the whole."""
    names = dict(zip(region.results(), call.outputs, strict=True))
    base = call.outputs[0].partition(".")[0]
    for number, node in enumerate(divided.crossing):
        names.setdefault(node, f"{base}.image{number}")
    passed = tuple(names[node] for node in divided.crossing)
    first = Call(divided.images.name, call.instance, tuple(call.inputs[p] for p in divided.image_inputs), passed)
    inputs = (*(call.inputs[place] for place in divided.token_inputs), *(names[node] for node in divided.given))
    rest = tuple(name for name in call.outputs if name not in passed)
    return first, Call(divided.tokens.name, call.instance, inputs, rest)

"""Cut a variant: the nodes that make some of its values from others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch.fx import Node

from vlmbuild.ir.program import Call, Program, Variant, needed_nodes


@dataclass(frozen=True, slots=True)
class PartOfCall:
    """Needed nodes of a call.

    Attributes:
        call: Call of a region.
        nodes: Those of its graph that are needed.
    """

    call: Call
    nodes: frozenset[Node]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a variant.

    Attributes:
        calls: Calls in order.
        inputs: Names of the values that it reads: inputs of the variant, and given ones.
    """

    calls: tuple[PartOfCall, ...]
    inputs: tuple[str, ...]


def cut(program: Program, variant: Variant, given: Collection[str], wanted: Collection[str]) -> Part:
    """Cut the part of a variant that computes the wanted values from its inputs and the given values."""
    open_values = set(wanted)
    read: dict[str, None] = {}
    calls: list[PartOfCall] = []
    for call in reversed(variant.calls):
        region = program.regions[call.region]
        results = [
            node
            for node, name in zip(region.results(), call.outputs, strict=True)
            if name in open_values and name not in given
        ]
        if not results:
            continue
        nodes = needed_nodes(results)
        activations = region.placeholders()[len(region.slots) :]
        names = [name for node, name in zip(activations, call.inputs, strict=True) if node in nodes]
        open_values.update(names)
        read.update(dict.fromkeys(names))
        calls.append(PartOfCall(call, frozenset(nodes)))
    made = {name for part in calls for name in part.call.outputs} - set(given)
    return Part(tuple(reversed(calls)), tuple(name for name in read if name not in made))


def embedded_tokens(program: Program, variant: Variant) -> tuple[str, ...]:
    """Return the activations that the decoder's input consists of, by name: the embeddings of the tokens, in which those of
    image tokens are replaced by image features, and the further features that single layers add at the image tokens."""
    for call in variant.calls:
        if "input_ids" in call.inputs:
            region = program.regions[call.region]
            read = zip(region.placeholders()[len(region.slots) :], call.inputs, strict=True)
            sources = {node for node, name in read if name in ("input_ids", "feature_index")}
            made = zip(region.results(), call.outputs, strict=True)
            return tuple(name for node, name in made if sources & needed_nodes([node]))
    raise AssertionError("a variant reads input_ids")

"""The linear layers of a program, plain and quantized, and its embeddings: one finder for quantization and adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.fx import Node

from vlmbuild.ir.program import Program, Region, Role, Slot, join
from vlmbuild.ops import ATTENTION, EMBEDDING, LINEAR

Part = Literal["attention", "mlp", "other"]
"""Position of a linear layer in its block."""

_OPS = torch.ops.vlmbuild


@dataclass(frozen=True, slots=True)
class LinearSite:
    """A linear layer in a region's graph.

    Attributes:
        node: The call.
        slot: The slot of its weight.
    """

    node: Node
    slot: Slot

    @property
    def module(self) -> str:
        """Module name relative to the instance."""
        return self.slot.name.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features). Packed weights have other shapes, and a loaded graph has none."""
        arguments: Any = self.node.args
        if self.node.target is _OPS.linear_4bit.default:
            in_features, out_features = arguments[6:8]
            return out_features, in_features
        out_features, in_features = self.slot.shape
        return out_features, in_features


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer of an instance.

    Attributes:
        module: Module name, "model.language_model.layers.0.mlp.up_proj".
        role: Role of its weight.
        shape: (out features, in features).
        part: Position in its block.
        number: Number of its repeated block ("model.language_model.layers.7": 7); None outside of blocks.
        shared: Whether something else uses its weight too, as a tied head uses the embeddings.
    """

    module: str
    role: Role
    shape: tuple[int, int]
    part: Part = "other"
    number: int | None = None
    shared: bool = False


def linear_sites(region: Region, operators: Collection[Any] = LINEAR) -> list[LinearSite]:
    """Return the linear layers of a graph whose weights are stored, in the order of their nodes."""
    slots = region.slot_nodes()
    nodes = (node for node in region.graph.graph.nodes if node.target in operators)
    return [
        LinearSite(node, slot)
        for node in nodes
        if (slot := slots.get(node.args[1])) is not None and slot.name.endswith(".weight")
    ]


def embedding_sites(region: Region) -> list[LinearSite]:
    """Return the lookups of a graph in stored token embeddings, in the order of their nodes."""
    slots = region.slot_nodes()
    nodes = (node for node in region.graph.graph.nodes if node.target is EMBEDDING)
    return [
        LinearSite(node, slot)
        for node in nodes
        if (slot := slots.get(node.args[0])) is not None and slot.role == "embedding" and slot.name.endswith(".weight")
    ]


def embeddings(program: Program) -> dict[str, LinearLayer]:
    """Map the module names of token embeddings to layers, which are `shared` if anything but lookups and linear layers (a
    tied head) reads their weight."""
    found: dict[str, LinearLayer] = {}
    others: set[str] = set()
    for region in program.regions.values():
        lookups = {site.node for site in embedding_sites(region)}
        linears = {site.node for site in linear_sites(region)}
        slots = {slot: node for node, slot in region.slot_nodes().items() if slot.role == "embedding"}
        for instance in region.instances:
            for slot, node in slots.items():
                module = join(instance, slot.name).removesuffix(".weight")
                if not lookups.isdisjoint(node.users):
                    rows, columns = slot.shape
                    found[module] = LinearLayer(module, slot.role, (rows, columns))
                if not (lookups | linears).issuperset(node.users):
                    others.add(module)
    return {module: replace(layer, shared=module in others) for module, layer in found.items()}


def linear_layers(program: Program, operators: Collection[Any] = LINEAR) -> Iterator[LinearLayer]:
    """Yield the linear layers whose weights are stored, once per instance, in the order of the program."""
    holders = Counter(
        join(instance, slot.name)
        for region in program.regions.values()
        for instance in region.instances
        for slot in region.slots
    )
    for region in program.regions.values():
        parts = _parts(region)
        for site in linear_sites(region, operators):
            weight: Any = site.node.args[1]
            for instance in region.instances:
                name = join(instance, site.slot.name)
                leaf = instance.rpartition(".")[2]
                yield LinearLayer(
                    name.removesuffix(".weight"),
                    site.slot.role,
                    site.shape,
                    parts[site.node],
                    int(leaf) if leaf.isdigit() else None,
                    len(weight.users) > 1 or holders[name] > 1,
                )


def _parts(region: Region) -> dict[Node, Part]:
    """Tell attention from MLP: layers that make queries, keys and values, or read an attention's result, before any other
    linear layer are attention's; the others of a graph with attention are the MLP's."""
    linears = [node for node in region.graph.graph.nodes if node.target in LINEAR]
    attentions = [node for node in region.graph.graph.nodes if node.target in ATTENTION]
    if not attentions:
        return dict.fromkeys(linears, "other")
    near = _reach(attentions, lambda node: node.all_input_nodes) | _reach(attentions, lambda node: node.users)
    return {node: "attention" if node in near else "mlp" for node in linears}


def _reach(starts: Iterable[Node], neighbours: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Return the linear layers that can be reached from the nodes without passing another one."""
    seen: set[Node] = set()
    reached: set[Node] = set()
    waiting = list(starts)
    while waiting:
        for node in neighbours(waiting.pop()):
            if node in seen:
                continue
            seen.add(node)
            if node.target is _OPS.lora.default:
                reached.add(node.args[0])  # type: ignore[arg-type]  # the layer below the adapter
            elif node.target in LINEAR:
                reached.add(node)
            else:
                waiting.append(node)
    return reached

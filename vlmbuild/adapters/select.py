"""Which linear layers of a program get a LoRA adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch.fx import Node

import vlmbuild.ops
from vlmbuild.adapters.lora import Lora
from vlmbuild.errors import UsageError
from vlmbuild.ir.program import Program, Region, Role, Slot, join

Part = Literal["attention", "mlp", "other"]
"""Position of a linear layer in its block."""

ALL_LINEAR = "all-linear"
ROLES: tuple[Role, ...] = ("language", "vision", "projector", "head")
"""Roles of layers that can have an adapter."""

_OPS = torch.ops.vlmbuild
LINEAR = (torch.ops.aten.linear.default, _OPS.linear_4bit.default, _OPS.linear_8bit.default)
"""The operators of linear layers, plain and quantized; the second argument is the weight."""

_ATTENTION = frozenset(
    getattr(_OPS, name.removeprefix("vlmbuild::")).default
    for name in vlmbuild.ops.OPERATORS
    if name.startswith("vlmbuild::attention") and not name.endswith("_backward")
)


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer of an instance.

    Attributes:
        module: Its name, for example "model.language_model.layers.0.mlp.up_proj".
        role: Role of its weight.
        part: Part of its block.
        features: (out, in).
        number: Number of its repeated block ("model.language_model.layers.7": 7); None outside of blocks.
    """

    module: str
    role: Role
    part: Part
    features: tuple[int, int]
    number: int | None


@dataclass(frozen=True, slots=True)
class Targets:
    """Which linear layers get an adapter; the fields are `vlmbuild.add_lora`'s."""

    target: str | Sequence[str] = ALL_LINEAR
    language: bool = True
    vision: bool = False
    attention: bool = True
    mlp: bool = True
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        names = self.target if isinstance(self.target, list | tuple | set | frozenset) else (self.target,)
        if not all(isinstance(name, str) for name in names):
            raise UsageError(
                f"target must be {ALL_LINEAR!r}, roles, names or patterns of modules; got {self.target!r}."
            )
        numbers = self.layers
        if numbers is not None and (isinstance(numbers, str | int) or not all(isinstance(n, int) for n in numbers)):
            raise UsageError(f"layers must be a list of the numbers of blocks, or None for all; got {numbers!r}.")


def linear_nodes(region: Region) -> list[tuple[Node, Slot]]:
    """Return the linear layers of a region's graph, with the slots of their weights."""
    slots = region.slot_nodes()
    layers = []
    for node in region.graph.graph.nodes:
        slot = slots.get(node.args[1]) if node.target in LINEAR else None
        if slot is not None and slot.name.endswith(".weight") and ".lora_" not in slot.name:
            layers.append((node, slot))
    return layers


def linear_features(region: Region, node: Node) -> tuple[int, int]:
    """Return (out, in) of a linear layer, from the weight or the arguments: a loaded graph has no shapes."""
    arguments: Any = node.args
    if node.target is _OPS.linear_4bit.default:
        in_features, out_features = arguments[6:8]
        return out_features, in_features
    out_features, in_features = region.slot_nodes()[arguments[1]].shape
    return out_features, in_features


def adaptable_layers(program: Program) -> list[Layer]:
    """Return every linear layer that can have an adapter, once per instance, in the order of the program."""
    layers = []
    for region in program.regions.values():
        parts = _parts(region)
        for node, slot in linear_nodes(region):
            if slot.role not in ROLES or (slot.role == "head" and program.ties):
                continue
            features = linear_features(region, node)
            for instance in region.instances:
                module = join(instance, slot.name).removesuffix(".weight")
                leaf = instance.rpartition(".")[2]
                layers.append(Layer(module, slot.role, parts[node], features, int(leaf) if leaf.isdigit() else None))
    return layers


def choose(program: Program, targets: Targets, lora: Lora) -> dict[str, Lora]:
    """Return the adapter of every chosen layer, by module name.

    Raises:
        UsageError: A role, pattern or layer number matches nothing that the other options allow, or nothing is left.
    """
    allowed = [layer for layer in adaptable_layers(program) if _is_allowed(layer, targets)]
    names = [targets.target] if isinstance(targets.target, str) else list(targets.target)
    if not names:
        raise UsageError(
            f"target names nothing. Pass {ALL_LINEAR!r}, a role ({', '.join(ROLES)}) or patterns of modules."
        )
    chosen: dict[str, Lora] = {}
    for name in names:
        hits = [layer.module for layer in allowed if _is_hit(layer, name, targets)]
        if not hits:
            raise UsageError(_no_match(program, name, targets))
        chosen.update(dict.fromkeys(hits, lora))
    numbers = {layer.number for layer in allowed if layer.module in chosen}
    if missing := sorted(set(targets.layers or ()) - numbers):
        raise UsageError(
            f"layers: there is no layer {missing[0]} among those chosen; the model's blocks are counted from 0."
        )
    return {layer.module: chosen[layer.module] for layer in allowed if layer.module in chosen}


def matches_module(pattern: str, module: str) -> bool:
    """Whether a name as in PEFT (the whole name or its end: "q_proj") or a pattern matches a module."""
    return module == pattern or module.endswith(f".{pattern}") or fnmatchcase(module, pattern)


def _is_allowed(layer: Layer, targets: Targets) -> bool:
    if not (targets.attention if layer.part == "attention" else targets.mlp if layer.part == "mlp" else True):
        return False
    if targets.layers is not None and layer.number not in targets.layers:
        return False
    return {"language": targets.language, "vision": targets.vision or "vision" in _named(targets)}.get(layer.role, True)


def _is_hit(layer: Layer, name: str, targets: Targets) -> bool:
    if name == ALL_LINEAR:
        return layer.role in ("language", "vision")
    return layer.role == name if name in ROLES else matches_module(name, layer.module)


def _named(targets: Targets) -> Iterable[str]:
    return (targets.target,) if isinstance(targets.target, str) else targets.target


def _no_match(program: Program, name: str, targets: Targets) -> str:
    """Return the reason that a target matches nothing."""
    if name == "head" and program.ties:
        return "The head shares its weight with the embeddings in this model and cannot be adapted."
    layers = adaptable_layers(program)
    hits = [layer for layer in layers if _is_hit(layer, name, targets)]
    if not hits:
        return (
            f"target {name!r} matches no linear layer. Targets are {ALL_LINEAR!r}, roles ({', '.join(ROLES)}), ends of "
            f"module names ('q_proj') or patterns ('*.layers.0.*'); a module of this model: {layers[0].module!r}."
        )
    roles = ", ".join(sorted({f"{layer.role}/{layer.part}" for layer in hits}))
    return (
        f"target {name!r} matches {len(hits)} linear layers ({roles}), and all are excluded by vision={targets.vision}, "
        f"language={targets.language}, attention={targets.attention}, mlp={targets.mlp} or layers={targets.layers}."
    )


def _parts(region: Region) -> dict[Node, Part]:
    """Return the part of each linear layer in a graph.

    Layers whose results reach attention, or that read its result, without another linear layer between are attention's; the
    others of a graph with attention are the MLP's.
    """
    linears = [node for node, _ in linear_nodes(region)]
    attentions = [node for node in region.graph.graph.nodes if node.target in _ATTENTION]
    if not attentions:
        return dict.fromkeys(linears, "other")
    near = _reach(attentions, lambda node: node.all_input_nodes) | _reach(attentions, lambda node: list(node.users))
    return {node: "attention" if node in near else "mlp" for node in linears}


def _reach(starts: Sequence[Node], neighbours: Any) -> set[Node]:
    """Return the linear layers reached from the nodes without passing another linear layer."""
    seen: set[Node] = set()
    reached: set[Node] = set()
    waiting = list(starts)
    while waiting:
        for node in neighbours(waiting.pop()):
            if node in seen:
                continue
            seen.add(node)
            if node.target is _OPS.lora.default:
                reached.add(node.args[0])  # the layer below the adapter
            elif node.target in LINEAR:
                reached.add(node)
            else:
                waiting.append(node)
    return reached

"""Which linear layers of a program get a LoRA adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from vlmbuild.adapters.lora import Lora
from vlmbuild.errors import UsageError
from vlmbuild.ir.linear_layers import LinearLayer, linear_layers
from vlmbuild.ir.program import Program, Role

ALL_LINEAR = "all-linear"
ROLES: tuple[Role, ...] = ("language", "vision", "projector", "head")
"""Roles of layers that can have an adapter."""


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


def adaptable_layers(program: Program) -> list[LinearLayer]:
    """Return every linear layer that can have an adapter, once per instance, in the order of the program."""
    return [
        layer for layer in linear_layers(program) if layer.role in ROLES and not (layer.role == "head" and program.ties)
    ]


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
    """Return whether a name as in PEFT (the whole name or its end: "q_proj") or a pattern matches a module."""
    return module == pattern or module.endswith(f".{pattern}") or fnmatchcase(module, pattern)


def _is_allowed(layer: LinearLayer, targets: Targets) -> bool:
    if not (targets.attention if layer.part == "attention" else targets.mlp if layer.part == "mlp" else True):
        return False
    if targets.layers is not None and layer.number not in targets.layers:
        return False
    return {"language": targets.language, "vision": targets.vision or "vision" in _named(targets)}.get(layer.role, True)


def _is_hit(layer: LinearLayer, name: str, targets: Targets) -> bool:
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

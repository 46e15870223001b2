"""Hold an adapter against a model: tensor names of every version, shapes, and parameters that are tied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from vlmbuild.adapters.peft_files import CONFIG_FILE, Adapter
from vlmbuild.adapters.select import adaptable_layers, matches_module
from vlmbuild.errors import SourceError, UsageError
from vlmbuild.families import Family
from vlmbuild.ir.program import Program

_Value = TypeVar("_Value")


def with_module_names(adapter: Adapter, family: Family, directory: str | Path) -> Adapter:
    """An adapter under the names that the family's modules have now. transformers renamed them in 4.52, and PEFT wrote what
    they were called when the adapter was trained ("model.layers.0...", "visual.blocks.0...").

    Raises:
        SourceError: Two of its tensors are the same one under an old and a new name.
    """
    return replace(
        adapter,
        loras=_renamed(adapter.loras, family, directory),
        tensors=_renamed(adapter.tensors, family, directory),
        trained=_renamed(adapter.trained, family, directory),
        modules=tuple(family.module_name(f"{module}.").removesuffix(".") for module in adapter.modules),
    )


def _renamed(named: Mapping[str, _Value], family: Family, directory: str | Path) -> dict[str, _Value]:
    found: dict[str, _Value] = {}
    for name, value in named.items():
        current = family.module_name(name)
        if current in found:
            raise SourceError(
                f"{directory} holds {current} twice, under an old and a new name. Train the adapter again."
            )
        found[current] = value
    return found


def check_fits(program: Program, adapter: Adapter, directory: str | Path) -> None:
    """Hold an adapter's tensors against a program, before anything is changed.

    Raises:
        SourceError: A tensor is missing, unknown or of another shape, or a tied parameter is untied by it; it is named.
    """
    layers = {layer.module: layer for layer in adaptable_layers(program)}
    for module, lora in adapter.loras.items():
        if module not in layers:
            raise SourceError(
                f"{directory}: {module} is not a linear layer of the model. The adapter is for another model."
            )
        out_features, in_features = layers[module].features
        needed = {"lora_A": (lora.r, in_features), "lora_B": (out_features, lora.r)}
        for part, shape in needed.items():
            name = f"{module}.{part}.default.weight"
            if name not in adapter.tensors:
                raise SourceError(f"{directory}: {name} is missing.")
            if tuple(adapter.tensors[name].shape) != shape:
                found = list(adapter.tensors[name].shape)
                raise SourceError(f"{directory}: {name} has shape {found}, not {list(shape)}.")
    _check_trained(program, adapter, directory)


def _check_trained(program: Program, adapter: Adapter, directory: str | Path) -> None:
    try:
        expected = frozenset().union(*trained_parameters(program, adapter.modules).values())
    except UsageError as error:
        raise SourceError(f"{directory}: {error}") from error
    if missing := sorted(expected - {program.ties.get(name, name) for name in adapter.trained}):
        raise SourceError(
            f"{directory}: {missing[0]} is missing, though {CONFIG_FILE} says that its module was trained. The adapter was "
            "not saved whole."
        )
    shapes = {name: slot.shape for name, slot in program.slots() if slot.kind == "parameter"}
    for name, tensor in adapter.trained.items():
        held = program.ties.get(name, name)
        if held not in shapes:
            raise SourceError(f"{directory}: {name} is not a parameter of the model, or it is quantized there.")
        if tuple(tensor.shape) != shapes[held]:
            raise SourceError(f"{directory}: {name} has shape {list(tensor.shape)}, not {list(shapes[held])}.")
        if held != name and not torch.equal(tensor, adapter.trained.get(held, tensor.new_empty(0))):
            raise SourceError(
                f"{directory}: {name} differs from {held}, but the model has one parameter for both. Train them together: "
                "add_lora(..., modules_to_save=['lm_head'])."
            )


def trained_parameters(program: Program, wanted: Iterable[str]) -> dict[str, frozenset[str]]:
    """Module -> its parameters, of every module that is named.

    Raises:
        UsageError: A name matches no module, or a module's weight is quantized.
    """
    found: dict[str, frozenset[str]] = {}
    for pattern in wanted:
        hits = _named_modules(program, pattern)
        if not hits:
            raise UsageError(f"modules_to_save: no module of the model is named {pattern!r}.")
        found |= hits
    return found


def _named_modules(program: Program, pattern: str) -> dict[str, frozenset[str]]:
    parameters = [(name, program.ties.get(name, name)) for name in program.ties]
    stored = dict(program.slots())
    parameters += [(name, name) for name, slot in stored.items() if slot.kind != "constant"]
    found: dict[str, set[str]] = {}
    for name, held in parameters:
        path = name.split(".")
        modules = (".".join(path[:length]) for length in range(1, len(path)))
        module = next((module for module in modules if matches_module(pattern, module)), None)
        if module is None:
            continue
        if stored[held].kind != "parameter":
            raise UsageError(
                f"modules_to_save: {module} is quantized and cannot be trained whole. Build the artifact with "
                f"--skip '{module}*', or adapt it with LoRA."
            )
        found.setdefault(module, set()).add(held)
        found.update({held.rpartition(".")[0]: {held}} if held != name else {})
    return {module: frozenset(names) for module, names in found.items()}


def check_finite(adapter: Adapter, directory: str | Path) -> None:
    """Raise SourceError for an adapter that holds NaN or infinity; the tensor is named."""
    for name, tensor in _all_tensors(adapter):
        if not torch.isfinite(tensor).all():
            raise SourceError(f"{directory}: {name} holds NaN or infinity. Take an earlier checkpoint of the adapter.")


def _all_tensors(adapter: Adapter) -> Iterable[tuple[str, torch.Tensor]]:
    yield from adapter.tensors.items()
    yield from adapter.trained.items()

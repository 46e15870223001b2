"""Checks that an adapter fits a model: tensor names of every version, shapes, and tied parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from vlmbuild.adapters.peft_files import CONFIG_FILE, WEIGHTS_FILE, Adapter
from vlmbuild.adapters.select import adaptable_layers, matches_module
from vlmbuild.errors import SourceError, UsageError
from vlmbuild.families import Family
from vlmbuild.ir.program import Program
from vlmbuild.util.text import listed
from vlmbuild.util.validation import require_finite

_Value = TypeVar("_Value")


def with_module_names(adapter: Adapter, family: Family, directory: str | Path) -> Adapter:
    """Rename an adapter's tensors to the family's current module names.

    transformers renamed modules in 4.52, and PEFT wrote the names of the time ("model.layers.0...", "visual.blocks.0...").

    Raises:
        SourceError: Two of its tensors are the same one under an old and a new name, or its config does not name a layer.
    """
    for module in adapter.loras:
        if not (adapter.is_target(module) or adapter.is_target(family.module_name(module))):
            targets = adapter.targets if isinstance(adapter.targets, str) else listed(adapter.targets, 3)
            raise SourceError(
                f"{directory}: target_modules in {CONFIG_FILE} ({targets}) does not match {module}, which {WEIGHTS_FILE} "
                "adapts, and PEFT would leave it out. Save the adapter again with PEFT."
            )
    return replace(
        adapter,
        loras=_renamed(adapter.loras, family, directory),
        tensors=_renamed(adapter.tensors, family, directory),
        trained=_renamed(adapter.trained, family, directory),
        modules=tuple(family.module_name(f"{module}.").removesuffix(".") for module in adapter.modules),
    )


def _renamed(named: Mapping[str, _Value], family: Family, directory: str | Path) -> dict[str, _Value]:
    renamed: dict[str, _Value] = {}
    for name, value in named.items():
        current = family.module_name(name)
        if current in renamed:
            raise SourceError(
                f"{directory} holds {current} twice, under an old and a new name. Train the adapter again."
            )
        renamed[current] = value
    return renamed


def check_fits(program: Program, adapter: Adapter, directory: str | Path) -> None:
    """Compare an adapter's tensors with a program, before anything is changed.

    Raises:
        SourceError: A tensor is missing, unknown or has another shape, or it unties a tied parameter; it is named.
    """
    layers = {layer.module: layer for layer in adaptable_layers(program)}
    for module, lora in adapter.loras.items():
        if module not in layers:
            raise SourceError(
                f"{directory}: {module} is not a linear layer of the model. Use an adapter of this model."
            )
        out_features, in_features = layers[module].shape
        needed = {"lora_A": (lora.r, in_features), "lora_B": (out_features, lora.r)}
        for part, shape in needed.items():
            name = f"{module}.{part}.default.weight"
            if name not in adapter.tensors:
                raise SourceError(f"{directory}: {name} is missing. Save the whole adapter again.")
            if tuple(adapter.tensors[name].shape) != shape:
                raise _shape_error(directory, name, adapter.tensors[name], shape)
    _check_trained(program, adapter, directory)


def _check_trained(program: Program, adapter: Adapter, directory: str | Path) -> None:
    try:
        expected = frozenset().union(*trained_parameters(program, adapter.modules).values())
    except UsageError as error:
        raise SourceError(f"{directory}: {error}") from error
    if missing := sorted(expected - {program.ties.get(name, name) for name in adapter.trained}):
        raise SourceError(
            f"{directory}: {missing[0]} is missing, though {CONFIG_FILE} says that its module was trained. Save the whole "
            "adapter again."
        )
    shapes = {name: slot.shape for name, slot in program.slots() if slot.kind == "parameter"}
    for name, tensor in adapter.trained.items():
        owner = program.ties.get(name, name)
        if owner not in shapes:
            raise SourceError(
                f"{directory}: {name} is not a parameter of the model, or it is quantized there. Use an adapter of this model."
            )
        if tuple(tensor.shape) != shapes[owner]:
            if tuple(tensor.shape[1:]) == shapes[owner][1:]:
                raise _rows_error(directory, name, len(tensor), shapes[owner][0])
            raise _shape_error(directory, name, tensor, shapes[owner])
        if owner != name and not torch.equal(tensor, adapter.trained.get(owner, tensor.new_empty(0))):
            raise SourceError(
                f"{directory}: {name} differs from {owner}, but the model has one parameter for both. Train them together: "
                "add_lora(..., modules_to_save=['lm_head'])."
            )


def _shape_error(directory: str | Path, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> SourceError:
    return SourceError(
        f"{directory}: {name} has shape {list(tensor.shape)}, not {list(shape)}. Use an adapter of this model."
    )


def _rows_error(directory: str | Path, name: str, rows: int, expected: int) -> SourceError:
    return SourceError(
        f"{directory}: {name} has {rows} rows, not {expected}: the vocabulary was resized before training. Load the adapter "
        "with FastVisionModel.from_pretrained and merge it with save_pretrained_merged, or resize the source first: "
        f"model.resize_token_embeddings({rows}), model.save_pretrained(SOURCE)."
    )


def trained_parameters(program: Program, patterns: Iterable[str]) -> dict[str, frozenset[str]]:
    """Return module -> its parameters, for every module that a pattern matches.

    Raises:
        UsageError: A pattern matches no module, or a module's weight is quantized.
    """
    modules: dict[str, frozenset[str]] = {}
    for pattern in patterns:
        matches = _matching_modules(program, pattern)
        if not matches:
            raise UsageError(
                f"modules_to_save: no module of the model is named {pattern!r}. Pass a name such as 'lm_head'."
            )
        modules |= matches
    return modules


def _matching_modules(program: Program, pattern: str) -> dict[str, frozenset[str]]:
    parameters = [(name, program.ties.get(name, name)) for name in program.ties]
    stored = dict(program.slots())
    parameters += [(name, name) for name, slot in stored.items() if slot.kind != "constant"]
    modules: dict[str, set[str]] = {}
    for name, owner in parameters:
        path = name.split(".")
        outer = (".".join(path[:length]) for length in range(1, len(path)))
        module = next((module for module in outer if matches_module(pattern, module)), None)
        if module is None:
            continue
        if stored[owner].kind != "parameter":
            raise UsageError(
                f"modules_to_save: {module} is quantized and cannot be trained whole. Build the artifact with "
                f"--skip '{module}*', or adapt it with LoRA."
            )
        modules.setdefault(module, set()).add(owner)
        if owner != name:
            modules[owner.rpartition(".")[0]] = {owner}
    return {module: frozenset(names) for module, names in modules.items()}


def check_finite(adapter: Adapter, directory: str | Path) -> None:
    """Raise SourceError for an adapter with NaN or infinity; the tensor is named."""
    for name, tensor in [*adapter.tensors.items(), *adapter.trained.items()]:
        require_finite(tensor, f"{directory}: {name}", "Take an earlier checkpoint of the adapter.")

"""LoRA adapters on a loaded model: new ones, and those that a directory holds in PEFT's format."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from vlmbuild.builder import adapt
from vlmbuild.checks import one_of
from vlmbuild.errors import SourceError, UsageError
from vlmbuild.program import Program, Role, join
from vlmbuild.runtime.adapter_files import read_adapter
from vlmbuild.runtime.model import AdapterSpec, VisionLanguageModel, unwrap

DEFAULT_ROLES: tuple[Role, ...] = ("language",)
ADAPTABLE_ROLES: tuple[Role, ...] = ("language", "vision", "projector", "head")


def add_lora(
    model: nn.Module, r: int = 16, alpha: float | None = None, roles: Collection[Role] = DEFAULT_ROLES
) -> None:
    """Freeze the model and add a trainable LoRA adapter to its linear layers, plain or quantized, in place.

    Args:
        model: From `vlmbuild.load`; may be compiled already.
        r: Rank.
        alpha: Scale is alpha / r; None is 2 r.
        roles: Which layers: "language", "vision", "projector", or, where it has a weight of its own, "head".

    Raises:
        UsageError: The rank is not positive, a role is unknown or has no layer, or the model has an adapter already.
    """
    model = unwrap(model)
    if r < 1:
        raise UsageError(f"r must be at least 1, got {r}.")
    chosen: tuple[Role, ...] = tuple([roles] if isinstance(roles, str) else roles)  # type: ignore[list-item]
    for role in chosen:
        one_of("roles", role, ADAPTABLE_ROLES)
    if "head" in chosen and model.program.ties:
        raise UsageError("The head shares its weight with the embeddings in this model and cannot be adapted.")
    _add(model, AdapterSpec(r, float(2 * r if alpha is None else alpha)), chosen)


def _add(
    model: VisionLanguageModel, spec: AdapterSpec, roles: tuple[Role, ...], modules: frozenset[str] | None = None
) -> None:
    if model.adapter is not None:
        raise UsageError("The model has an adapter already; load the artifact again for another one.")
    report = adapt(model.program, spec.r, spec.alpha, roles, modules)
    if not report.matches:
        raise UsageError(f"No linear layer has a role among {', '.join(roles)}; nothing to adapt.")
    model.requires_grad_(False)
    model.adopt_adapter(spec, report.sites)


def load_adapter(model: nn.Module, directory: str | Path) -> None:
    """Give a model without an adapter the one that a directory holds in PEFT's format.

    Equal layers share one graph: when the directory has an adapter for a linear layer of one block, that layer of every
    equal block gets one, which starts at zero. All are trainable, and dropout is not applied.

    Raises:
        UsageError: The model has an adapter already.
        SourceError: It is not a plain LoRA adapter, or it does not fit the model; the tensor is named. The model is then
            as it was.
    """
    rank, alpha, tensors = read_adapter(directory)
    model = unwrap(model)
    modules = {name.partition(".lora_")[0] for name in tensors}
    for module in sorted(modules):
        _check_pair(model, module, rank, tensors, directory)
    if not modules:
        raise SourceError(f"{directory} holds no LoRA tensors.")
    _add(model, AdapterSpec(rank, alpha), model.roles_of(modules), frozenset(modules))
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)


def _check_pair(
    model: VisionLanguageModel, module: str, rank: int, tensors: dict[str, torch.Tensor], directory: str | Path
) -> None:
    """Both matrices of a linear layer must be there and fit it, and nothing else."""
    features = _linear_features(model.program).get(module)
    if features is None:
        raise SourceError(
            f"{directory}: {module} is not a linear layer of the model. The adapter is for another model."
        )
    out_features, in_features = features
    needed = {
        f"{module}.lora_A.default.weight": (rank, in_features),
        f"{module}.lora_B.default.weight": (out_features, rank),
    }
    for name in sorted(needed.keys() | {name for name in tensors if name.partition(".lora_")[0] == module}):
        if name not in needed or name not in tensors:
            raise SourceError(
                f"{directory}: {name} is {'missing' if name in needed else 'not part of a plain adapter'}."
            )
        if tuple(tensors[name].shape) != needed[name]:
            raise SourceError(f"{directory}: {name} has shape {list(tensors[name].shape)}, not {list(needed[name])}.")


def _linear_features(program: Program) -> dict[str, tuple[int, ...]]:
    """Module -> (out, in) of everything that may be a linear layer, plain or quantized."""
    shapes: dict[str, tuple[int, ...]] = {}
    for region in program.regions.values():
        weights = {
            slot.name: slot.shape for slot in region.slots if slot.kind == "parameter" and slot.role != "embedding"
        }
        weights |= {recipe.source: recipe.shape for recipe in region.recipes}
        for instance in region.instances:
            for name, shape in weights.items():
                if len(shape) == 2 and name.endswith(".weight"):
                    shapes[join(instance, name).removesuffix(".weight")] = shape
    return shapes

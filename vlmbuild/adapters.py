"""LoRA adapters on a loaded model: new ones, and those that a directory holds in PEFT's format."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from vlmbuild.builder import adapt, adaptable
from vlmbuild.errors import SourceError, UsageError
from vlmbuild.program import Role
from vlmbuild.runtime.adapter import read_adapter, unwrap
from vlmbuild.runtime.model import AdapterSpec, VisionLanguageModel

DEFAULT_ROLES: tuple[Role, ...] = ("language",)


def add_lora(
    model: nn.Module, r: int = 16, alpha: float | None = None, roles: Collection[Role] = DEFAULT_ROLES
) -> None:
    """Freeze the model and add a trainable LoRA adapter to its linear layers, plain or quantized, in place.

    Args:
        model: From `vlmbuild.load`; may be compiled already.
        r: Rank.
        alpha: Scale is alpha / r; None is 2 r.
        roles: Which layers: "language", "vision", "projector", "head".

    Raises:
        UsageError: The rank is not positive, no layer has one of the roles, or the model has an adapter already.
    """
    model = unwrap(model)
    if r < 1:
        raise UsageError(f"r must be at least 1, got {r}.")
    if model.adapter is not None:
        raise UsageError("The model has an adapter already; load the artifact again for another one.")
    spec = AdapterSpec(r, float(2 * r if alpha is None else alpha))
    report = adapt(model.program, spec.r, spec.alpha, tuple(roles))
    if not report.matches:
        raise UsageError(f"No linear layer has a role among {', '.join(roles)}; nothing to adapt.")
    model.requires_grad_(False)
    model.adopt_adapter(spec, report.sites)


def load_adapter(model: nn.Module, directory: str | Path) -> None:
    """Give a model without an adapter the one that a directory holds in PEFT's format.

    Equal layers share one graph, so every linear layer of a role gets an adapter; those that the directory does not name
    start at zero, which changes nothing.

    Raises:
        SourceError: It is not a plain LoRA adapter, or it does not fit the model; the tensor is named. The model is then
            as it was.
    """
    rank, alpha, tensors = read_adapter(directory)
    model = unwrap(model)
    modules = {name.partition(".lora_")[0] for name in tensors}
    for module in sorted(modules):
        _check_pair(model, module, rank, tensors, directory)
    add_lora(model, rank, alpha, roles=model.roles_of(modules))
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)


def _check_pair(
    model: VisionLanguageModel, module: str, rank: int, tensors: dict[str, torch.Tensor], directory: str | Path
) -> None:
    """Both matrices of a linear layer must be there and fit it, and nothing else."""
    features = adaptable(model.program).get(module)
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

"""LoRA adapters on a loaded model: new ones, and those that a directory holds in PEFT's format."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from vlmbuild.builder import adapt
from vlmbuild.errors import SourceError, UsageError
from vlmbuild.program import Role
from vlmbuild.runtime.adapter import read_adapter, unwrap
from vlmbuild.runtime.model import AdapterSpec

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

    Raises:
        SourceError: It is not a plain LoRA adapter, or it does not fit the model; the tensor is named.
    """
    rank, alpha, tensors = read_adapter(directory)
    model = unwrap(model)
    modules = {name.partition(".lora_")[0] for name in tensors}
    add_lora(model, rank, alpha, roles=model.roles_of(modules))
    adapters = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    for name in sorted(set(tensors) ^ set(adapters)):
        raise SourceError(f"{directory}: {name} is {'not in the model' if name in tensors else 'missing'}.")
    with torch.no_grad():
        for name, parameter in adapters.items():
            if parameter.shape != tensors[name].shape:
                raise SourceError(
                    f"{directory}: {name} has shape {list(tensors[name].shape)}, not {list(parameter.shape)}."
                )
            parameter.copy_(tensors[name])

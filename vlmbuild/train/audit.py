"""A check before training that every trainable parameter gets a gradient, with gradient checkpointing and without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmbuild.errors import GradientError, UsageError
from vlmbuild.runtime.torch.checkpointing import Checkpointing
from vlmbuild.runtime.torch.model import VisionLanguageModel, unwrap

_SHOWN = 6
_PROBE = 1e-2
"""Standard deviation of numbers that replace matrices that are still zero."""
_SAME = 1e-2
"""Relative difference at which two gradients count as equal: bfloat16 rounds, and nothing else differs."""


@dataclass(frozen=True, slots=True)
class GradientAudit:
    """Result of an audit.

    Attributes:
        norms: Parameter -> norm of its gradient.
        loss: Loss of the batch.
    """

    norms: Mapping[str, float]
    loss: float

    def __str__(self) -> str:
        smallest = min(self.norms, key=lambda name: self.norms[name])
        return (
            f"All {len(self.norms)} trainable parameters get a gradient, with checkpointing and without; the smallest is "
            f"{self.norms[smallest]:.1e} ({smallest})."
        )


def audit_gradients(model: nn.Module, batch: Mapping[str, Any]) -> GradientAudit:
    """Run one batch forward and backward, twice, and fail if a trainable parameter gets no gradient.

    A LoRA adapter starts with B = 0, where the gradient of A is rightly zero: small numbers replace such a B during the audit.
    Afterwards parameters, gradients, mode, checkpointing and random state are as before.

    Args:
        model: Model to train; may be compiled or wrapped (the model itself is run).
        batch: Training batch with `labels`, and with images if parameters for images are trained.

    Raises:
        GradientError: A gradient is missing, zero, not finite, or differs with checkpointing; the parameter is named.
        UsageError: Nothing is trainable, or the batch has no labels.
    """
    model = unwrap(model)
    parameters = dict(model.trainable_parameters())
    if not parameters:
        raise UsageError("The model has no trainable parameter. Call vlmbuild.add_lora(model) first.")
    if batch.get("labels") is None:
        raise UsageError("The audit needs a batch with labels. Pass one from your training data.")
    with _probing(model, parameters):
        model.checkpointing = None
        loss, plain = _gradients(model, parameters, batch)
        model.checkpointing = Checkpointing()
        _, recomputed = _gradients(model, parameters, batch)
    faults = {name: fault for name in parameters if (fault := _fault(plain[name], recomputed[name]))}
    if faults:
        raise GradientError(_message(faults, len(parameters), batch))
    return GradientAudit({name: float(gradient.norm()) for name, gradient in _present(plain)}, loss)


def _gradients(
    model: VisionLanguageModel, parameters: Mapping[str, nn.Parameter], batch: Mapping[str, Any]
) -> tuple[float, dict[str, Tensor | None]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # dropout must be the same both times
        loss = model(**batch).loss
        if not loss.requires_grad:
            return float(loss), dict.fromkeys(parameters)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return float(loss.detach()), dict(zip(parameters, gradients, strict=True))


@contextmanager
def _probing(model: VisionLanguageModel, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Set training mode, and replace zero matrices."""
    training, checkpointing = model.training, model.checkpointing
    zeros = [p for name, p in parameters.items() if ".lora_B." in name and not p.any()]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in zeros:
                parameter.copy_(_PROBE * torch.randn(parameter.shape, generator=generator))
        model.train()
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()
        model.train(training)
        model.checkpointing = checkpointing


def _fault(plain: Tensor | None, recomputed: Tensor | None) -> str:
    """Return the fault of a parameter's gradients, or ""."""
    if plain is None or recomputed is None:
        return "no gradient" if plain is None else "no gradient with checkpointing"
    for gradient, when in ((plain, ""), (recomputed, " with checkpointing")):
        if not torch.isfinite(gradient).all():
            return f"a gradient that is not finite{when}"
        if not gradient.any():
            return f"a gradient of zero{when}"
    differs = (plain - recomputed).norm() > _SAME * plain.norm()
    return "another gradient with checkpointing than without" if differs else ""


def _present(gradients: Mapping[str, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    return ((name, gradient) for name, gradient in gradients.items() if gradient is not None)


def _message(faults: Mapping[str, str], trainable: int, batch: Mapping[str, Any]) -> str:
    shown = "; ".join(f"{name} gets {fault}" for name, fault in list(faults.items())[:_SHOWN])
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    images = any(key.startswith("pixel_values") and value is not None for key, value in batch.items())
    hint = (
        "Freeze them, or find out why the loss does not depend on them."
        if images
        else "The batch has no image. Audit with one that has, if parameters for images are trained."
    )
    return f"{len(faults)} of {trainable} trainable parameters would not be trained: {shown}{more}. {hint}"

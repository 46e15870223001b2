"""Storage of linear layers within a budget of bits: measure the loss of each, and keep layers with the greatest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.errors import UsageError
from vlmbuild.ir.linear_layers import linear_layers
from vlmbuild.ir.program import Program
from vlmbuild.measure.calibration import Batch, output_losses
from vlmbuild.measure.sensitivity import keep_within, weight_losses
from vlmbuild.quant.decide import Decision
from vlmbuild.quant.spec import QuantSpec
from vlmbuild.recipe import Recipe
from vlmbuild.util.progress import Progress


def within_budget(
    decisions: Mapping[str, Decision],
    program: Program,
    checkpoint: Checkpoint,
    spec: QuantSpec,
    recipe: Recipe,
    calibration: Sequence[Batch],
    progress: Progress,
) -> dict[str, Decision]:
    """Return the decisions with those of measured layers replaced, so that the budget holds.

    Raises:
        UsageError: The budget cannot be met, or no layer is left to decide about.
        SourceError: A weight is quantized already, or cannot be measured.
    """
    form, budget = spec.weight_format(), spec.budget
    assert form is not None  # a budget has a format
    assert budget is not None
    layers = [
        layer
        for layer in linear_layers(program)
        for decision in [decisions[layer.module]]
        if decision.format == form
        and layer.role in spec.roles
        and not decision.pinned  # the spec decided, and no pattern
    ]
    if not layers:
        raise UsageError("No linear layer is left for the budget to decide about. Check roles, skips and overrides.")
    dtype = getattr(torch, recipe.dtype)
    losses = (
        output_losses(layers, form, checkpoint, program, calibration, progress)
        if calibration
        else weight_losses(layers, form, checkpoint, dtype, progress)
    )
    chosen = keep_within(losses, form, budget, 8 * dtype.itemsize)
    measured = {
        loss.layer.module: Decision(form, error=loss.error)
        if chosen[loss.layer.module]
        else Decision(None, "sensitive, kept within the budget", loss.error)
        for loss in losses
    }
    return {module: measured.get(module, decision) for module, decision in decisions.items()}

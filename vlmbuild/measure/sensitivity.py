"""How much each linear layer would lose if it were quantized, and which ones to keep within a budget of bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.checkpoint.tensors import SourceTensor
from vlmbuild.errors import SourceError, UsageError
from vlmbuild.formats import WeightFormat
from vlmbuild.ir.linear_layers import LinearLayer
from vlmbuild.util.cpu import available_cores, single_threaded
from vlmbuild.util.progress import Progress

_CHUNK = 2**22


@dataclass(frozen=True, slots=True)
class Loss:
    """Error of a layer when it is quantized.

    Attributes:
        layer: The layer.
        error: Squared error relative to the squared norm: of the weight; or of the block's output on calibration batches.
    """

    layer: LinearLayer
    error: float


def weight_losses(
    layers: Sequence[LinearLayer], form: WeightFormat, checkpoint: Checkpoint, dtype: torch.dtype, progress: Progress
) -> list[Loss]:
    """Measure the rounding of weights of a dtype, read in chunks, on all cores. The rounding of the scales themselves,
    which is the same for all and a hundred times smaller, is left out.

    Raises:
        SourceError: A weight is quantized already, or holds NaN or infinity.
    """
    sources = [plain_source(checkpoint, f"{layer.module}.weight") for layer in layers]

    def measure(layer: LinearLayer, source: SourceTensor) -> Loss:
        error = norm = 0.0
        for chunk in source.values(checkpoint.weights, dtype, _CHUNK):
            values = chunk.to(dtype)
            rounding = (values.float() - form.rounded(values, source.name)).double()
            error += rounding.square().sum().item()
            norm += values.double().square().sum().item()
        return Loss(layer, error / norm if norm else 0.0)

    found = []
    with single_threaded() as start_thread, ThreadPoolExecutor(available_cores(), initializer=start_thread) as pool:
        for loss in pool.map(measure, layers, sources):
            found.append(loss)
            progress("sensitivity", len(found), len(layers))
    return found


def plain_source(checkpoint: Checkpoint, name: str) -> SourceTensor:
    """Return a parameter of the source. Raises SourceError if it is quantized already."""
    source = checkpoint.tensors[name]
    if source.format is not None:
        raise SourceError(
            f"{source.name} is quantized already ({source.format.describe()}), so what it lost cannot be measured. Build "
            "with auto from the unquantized checkpoint."
        )
    return source


def keep_within(
    losses: Sequence[Loss], form: WeightFormat, budget: float, kept_bits: int
) -> dict[str, WeightFormat | None]:
    """Choose module -> format: layers keep their dtype (`kept_bits`) in the order of the loss saved per bit, while the
    average over all layers, with scales, stays within the budget of bits per weight.

    Raises:
        UsageError: The budget is below the bits of `form` for all layers.
    """
    weights = sum(math.prod(loss.layer.shape) for loss in losses)
    spent = sum(form.bits(loss.layer.shape) for loss in losses)
    if spent > budget * weights:
        raise UsageError(
            f"A budget of {budget:g} bits per weight cannot be met: {form.describe()} takes {spent / weights:.3f}. Give at "
            "least that, or larger blocks."
        )
    chosen: dict[str, WeightFormat | None] = {loss.layer.module: form for loss in losses}
    for loss in sorted(losses, key=lambda loss: (-_density(loss, form, kept_bits), loss.layer.module)):
        extra = kept_bits * math.prod(loss.layer.shape) - form.bits(loss.layer.shape)
        if spent + extra <= budget * weights:
            chosen[loss.layer.module] = None
            spent += extra
    return chosen


def _density(loss: Loss, form: WeightFormat, kept_bits: int) -> float:
    extra = kept_bits * math.prod(loss.layer.shape) - form.bits(loss.layer.shape)
    # Three digits: what a sum's order changes beyond them must not decide.
    return float(f"{loss.error / extra:.2e}") if extra > 0 else math.inf

"""How much each linear layer would lose if it were quantized, and which ones to keep within a budget of bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.checkpoint.tensors import SourceTensor
from vlmbuild.errors import SourceError, UsageError
from vlmbuild.formats import WeightFormat
from vlmbuild.ir.linear_layers import LinearLayer
from vlmbuild.quant.decide import Decision
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
    layers: Sequence[LinearLayer],
    form: WeightFormat,
    weights: CheckpointWeights,
    tensors: Mapping[str, SourceTensor],
    dtype: torch.dtype,
    progress: Progress,
) -> list[Loss]:
    """Measure the rounding of weights, read in chunks, on all cores. The rounding of the scales themselves, which is
    the same for all and a hundred times smaller, is left out.

    Args:
        layers: Layers to measure.
        form: Format to measure.
        weights: Weights of the source.
        tensors: The source's parameters by module name.
        dtype: Dtype of weights before they are quantized.
        progress: Called with the number of layers that are done.

    Raises:
        SourceError: A weight holds NaN or infinity.
    """

    def measure(layer: LinearLayer) -> Loss:
        source = tensors[f"{layer.module}.weight"]
        error = norm = 0.0
        for values in _chunks(weights, source, dtype):
            rounding = (values.float() - form.rounded(values, source.name)).double()
            error += rounding.square().sum().item()
            norm += values.double().square().sum().item()
        return Loss(layer, error / norm if norm else 0.0)

    found = []
    with single_threaded() as start_thread, ThreadPoolExecutor(available_cores(), initializer=start_thread) as pool:
        for loss in pool.map(measure, layers):
            found.append(loss)
            progress("sensitivity", len(found), len(layers))
    return found


def keep_within(
    losses: Sequence[Loss], form: WeightFormat, budget: float, kept_bits: int
) -> dict[str, WeightFormat | None]:
    """Choose module -> format within the budget.

    Layers keep their dtype in the order of the loss saved per bit, while the average stays within the budget.

    Args:
        losses: Losses of all layers that may be quantized.
        form: Format of quantized layers.
        budget: Bits per weight, with scales, on average over these layers.
        kept_bits: Bits per weight of a layer that is kept.

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


def refine(
    decisions: Mapping[str, Decision], losses: Sequence[Loss], form: WeightFormat, budget: float, kept_bits: int
) -> dict[str, Decision]:
    """Replace the decisions about measured layers, within the budget. Raises the errors of `keep_within`."""
    chosen = keep_within(losses, form, budget, kept_bits)
    measured = {
        loss.layer.module: Decision(form, error=loss.error)
        if chosen[loss.layer.module]
        else Decision(None, "sensitive, kept within the budget", loss.error)
        for loss in losses
    }
    return {module: measured.get(module, decision) for module, decision in decisions.items()}


def _density(loss: Loss, form: WeightFormat, kept_bits: int) -> float:
    extra = kept_bits * math.prod(loss.layer.shape) - form.bits(loss.layer.shape)
    # Three digits: what a sum's order changes beyond them must not decide.
    return float(f"{loss.error / extra:.2e}") if extra > 0 else math.inf


def check_plain(source: SourceTensor) -> None:
    """Raise SourceError for a tensor that is quantized already."""
    if source.format is not None:
        raise SourceError(
            f"{source.name} is quantized already ({source.format.describe()}), so what it lost cannot be measured. Build "
            "with auto from the unquantized checkpoint."
        )


def _chunks(weights: CheckpointWeights, source: SourceTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    total = math.prod(source.shape)
    for first in range(0, total, _CHUNK):
        yield weights.read_part(source.name, first, min(_CHUNK, total - first)).to(dtype)

"""The target compressed-tensors: weights are rounded as they stream through, and the loss of each layer is recorded."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.checkpoint.tensors import SourceTensor
from vlmbuild.errors import UsageError
from vlmbuild.quant.compressed_formats import library
from vlmbuild.quant.decide import Decision
from vlmbuild.quant.spec import ROUNDED_BEFORE
from vlmbuild.recipe import Recipe
from vlmbuild.targets.compressed_tensors.config import quantization_config
from vlmbuild.targets.golden import record_golden
from vlmbuild.targets.records import publish
from vlmbuild.targets.request import Request
from vlmbuild.targets.trainable import format_names, write_checkpoint

LIBRARY = "compressed-tensors"


def check(recipe: Recipe) -> None:
    """Raise UsageError for a recipe that names no format: sources have others than those of this target."""
    if recipe.quantize is None or recipe.quantize.format == "source":
        raise UsageError(
            "--target compressed-tensors needs a format. Pass --quantize w4a16, w8a8 or fp8, or none for unquantized weights."
        )


@contextmanager
def writing() -> Iterator[Callable[[ArtifactWriter, Request], Manifest]]:
    """Return the function that writes. Raises IncompatibleError without the library, before the model is captured."""
    library()
    yield write


def write(writer: ArtifactWriter, request: Request) -> Manifest:
    """Write and publish an artifact; weights pass through memory in chunks.

    Raises:
        SourceError: A tensor cannot be read or quantized.
        ParityError: The merged weights differ from source plus adapter, or lose more than rounding explains.
        OutputError: There is no space, or the output cannot be written.
    """
    announced = quantization_config(request.program, request.family, request.decisions)
    errors = write_checkpoint(writer, request, announced)
    decisions = {
        module: _with_loss(decision, errors.get(f"{module}.weight"), request.tensors.get(f"{module}.weight"))
        for module, decision in request.decisions.items()
    }
    return publish(
        writer,
        replace(request, decisions=decisions),
        formats=format_names(request.program),
        toolchain={LIBRARY: importlib.metadata.version(LIBRARY)},
        numerics=[*request.measure(writer.staging), *record_golden(writer, request, always=True, measured=decisions)],
    )


def _with_loss(decision: Decision, error: float | None, source: SourceTensor | None) -> Decision:
    """Add what rounding lost, and that the source was rounded before, if so: the loss is that of the second time alone."""
    if decision.format is None or source is None:
        return decision
    if error is None:
        return replace(decision, reason="as in the source")
    before = source.format.describe() if source.format is not None else ""
    before = source.dequantized.layout if source.dequantized is not None else before
    reasons = [decision.reason, f"{ROUNDED_BEFORE}{before}" if before else ""]
    return replace(decision, error=error, reason="; ".join(filter(None, reasons)))

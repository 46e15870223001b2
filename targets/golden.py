"""Golden cases of a build: recorded from the weights that were written, and compared with the source's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.errors import ParityError
from vlmbuild.golden.cases import NUMERICS_PREFIX, GoldenCase
from vlmbuild.golden.files import write_golden
from vlmbuild.golden.record import GoldenRecord, ends_of, record
from vlmbuild.golden.sample import difference
from vlmbuild.golden.stages import LOGITS, stage_key
from vlmbuild.golden.tolerances import ROUNDED, STORED
from vlmbuild.golden.weights import WEIGHTS
from vlmbuild.ir.program import Region, join
from vlmbuild.measure.reference import SlotWeights
from vlmbuild.quant.decide import Decision
from vlmbuild.targets.request import Request
from vlmbuild.targets.weights import parameter_values


class SourceWeights:
    """Weights of a build's source in float32, with the adapter merged into them."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def slots(self, region: Region, instance: str, constants: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the tensors of an instance's slots."""
        return tuple(self._tensor(join(instance, slot.name), slot.shape, constants) for slot in region.slots)

    def _tensor(self, name: str, shape: tuple[int, ...], constants: dict[str, Tensor]) -> Tensor:
        if name in constants:
            return constants[name]
        return torch.cat([chunk.float() for chunk in parameter_values(self._request, name, torch.float32)]).view(shape)

    @classmethod
    def fits(cls, request: Request) -> bool:
        """Tell whether the program reads plain weights, as the source has them."""
        slots = [(name, slot) for name, slot in request.program.slots() if slot.kind != "constant"]
        return all(name in request.tensors and request.tensors[name].shape == slot.shape for name, slot in slots)


def record_golden(
    writer: ArtifactWriter,
    request: Request,
    weights: SlotWeights | None = None,
    *,
    always: bool = False,
    measured: Mapping[str, Decision] | None = None,
) -> list[dict[str, Any]]:
    """Record golden cases of weights that are complete in the staging directory, and write them into the artifact.

    Args:
        writer: Writer of the artifact, with the files of config and processor.
        request: The build.
        weights: The artifact's, as stored; None opens them as `vlmbuild.golden.weights.WEIGHTS` says.
        always: Record the packaged cases where the build names none.
        measured: Decisions with the relative errors of rounded weights; None if the target does not measure them.

    Returns:
        The manifest's records: for each case, what storing the weights has changed.

    Raises:
        ParityError: The weights compute something else than the source's: unquantized ones at any stage, others at the
            logits, beyond what rounding explains.
        SourceError: The processor cannot make a case.
    """
    if request.golden is None and not always:
        return []
    family, config, directory = request.family, request.checkpoint.config, writer.staging
    stored = WEIGHTS[request.recipe.target](directory, family) if weights is None else weights
    processor, ends = family.processor(directory), ends_of(directory, config)

    def run(read: SlotWeights, cases: Sequence[GoldenCase]) -> list[GoldenRecord]:
        return record(request.program, family, config, processor, read, cases, ends, request.progress)

    found = run(stored, request.golden or ())
    write_golden(writer, found)
    if not SourceWeights.fits(request):
        return []
    expected = run(SourceWeights(request), [entry.case for entry in found])
    return list(_records(request, found, expected, measured or {}))


def _records(
    request: Request,
    found: Sequence[GoldenRecord],
    expected: Sequence[GoldenRecord],
    measured: Mapping[str, Decision],
) -> Iterator[dict[str, Any]]:
    """Yield the manifest's records. Raises ParityError."""
    dtype = request.recipe.dtype
    formats = sorted({recipe.format.name for region in request.program.regions.values() for recipe in region.recipes})
    errors_of_weights = [decision.error for decision in measured.values() if decision.format and decision.error]
    limit = min(1.0, ROUNDED * max(errors_of_weights, default=1.0)) if formats else STORED[dtype]
    for mine, theirs in zip(found, expected, strict=True):
        errors = {stage: difference(mine.samples[stage], theirs.samples[stage]) for stage in theirs.samples}
        for stage in [LOGITS] if formats else sorted(errors, key=stage_key):
            if not errors[stage] <= limit:
                remedy = "Keep more layers with --skip PATTERN" if formats else "Build with --dtype float32"
                raise ParityError(
                    f"The stored weights differ from the source's: golden case {mine.case.name!r}, stage {stage}: relative "
                    f"error {errors[stage]:.1e}, and at most {limit:.1e} is allowed in {', '.join(formats) or dtype}. Nothing "
                    f"was published. {remedy}; if that fails too, report it."
                )
        same = [a == b for a, b in zip(mine.greedy, theirs.greedy, strict=False)]
        yield {
            "case": NUMERICS_PREFIX + mine.case.name,
            "output": LOGITS,
            "dtype": dtype,
            "formats": formats,
            "error": f"{errors[LOGITS]:.1e}",
            "tolerance": f"{limit:.1e}",
            "generated": len(theirs.greedy),
            "greedy": [*same, False].index(False),
        }

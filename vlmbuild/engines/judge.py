"""Judge what an engine has computed: tolerances on an artifact, and differences that come from the engine's own pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlmbuild.artifact.manifest import Manifest
from vlmbuild.engines.ask import Answers, Engine
from vlmbuild.golden import tolerances
from vlmbuild.golden.cases import NUMERICS_PREFIX
from vlmbuild.golden.compare import Limits, StageResult, compare
from vlmbuild.golden.record import GoldenRecord, record_artifact
from vlmbuild.golden.stages import PIXELS, TOKENS
from vlmbuild.measure.onnx_parity import ROUNDED_INPUTS
from vlmbuild.quant.spec import QuantSpec
from vlmbuild.util.progress import Progress, silent


def judge(
    directory: Path,
    manifest: Manifest,
    engine: Engine,
    records: Sequence[GoldenRecord],
    answers: Answers,
    progress: Progress = silent,
) -> tuple[list[StageResult], list[str]]:
    """Compare an engine's answers with golden cases.

    Where its pixels differ within their tolerance, because another library resized the images, and a later stage differs, the
    case is compared again with what the program makes of the engine's pixels. That reads all weights once a generated token.

    Args:
        directory: The artifact.
        manifest: Its manifest.
        engine: The engine.
        records: The cases.
        answers: Its answers to them, in the same order.
        progress: Called with a stage's name, the amount done, and the total.

    Returns:
        The results in the order of the stages, and the names of the cases that were compared again.

    Raises:
        SourceError: The processor cannot make a case, or makes pixels of another shape than the engine's.
    """
    limits = limits_on(engine, manifest, answers.dtype)
    pairs = zip(records, answers.cases, strict=True)
    again = [number for number, (one, its) in enumerate(pairs) if _by_pixels(compare([one], [its], limits))]
    judged = list(records)
    if again:
        cases = [replace(records[number].case, pixels=answers.cases[number].values[PIXELS]) for number in again]
        made = record_artifact(directory, manifest.target, cases, progress=progress)
        for number, record in zip(again, made, strict=True):
            samples = {**record.samples, PIXELS: records[number].samples[PIXELS]}
            judged[number] = replace(record, samples=samples)
    return compare(judged, answers.cases, limits), [records[number].case.name for number in again]


def limits_on(engine: Engine, manifest: Manifest, dtype: str | None) -> Limits:
    """Return the tolerances of an engine on an artifact, which are wider where inputs are rounded: by formats, or as the build
    has found.

    Args:
        engine: The engine.
        manifest: The artifact's manifest.
        dtype: Dtype in which the engine computes; None is the artifact's.
    """
    vision = language = 0.0
    if spec := manifest.recipe.get("quantize"):
        quantize = QuantSpec.from_mapping(spec, "recipe")
        tower = [quantize.role_format("vision"), quantize.role_format("projector")]
        overrides = [override.weight_format() for override in quantize.overrides]
        vision = max((form.input_error for form in [*tower, *overrides] if form), default=0.0)
        language = max((form.input_error for form in quantize.weight_formats()), default=0.0)
    exported = [record for record in manifest.numerics if not record["case"].startswith(NUMERICS_PREFIX)]
    if any(record["tolerance"] and float(record["tolerance"]) >= ROUNDED_INPUTS for record in exported):
        vision = language = max(language, tolerances.ROUNDED_BLOCKS)
    return engine.limits(dtype or str(manifest.recipe["dtype"]), vision=vision, language=language)


def _by_pixels(results: Sequence[StageResult]) -> bool:
    """Tell whether a case's tokens agree, its pixels are within their tolerance, and a later stage differs by a number."""
    before = {result.stage: result.verdict for result in results if result.stage in (TOKENS, PIXELS)}
    differs = any(result.verdict == "differs" and math.isfinite(result.error) for result in results)
    return differs and before.get(PIXELS) == "within" and before.get(TOKENS) != "differs"

"""Judge what an engine has computed: tolerances on an artifact, and differences that come from the engine's own pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlmbuild.artifact.manifest import Manifest
from vlmbuild.engines.ask import Answers, Engine
from vlmbuild.golden import tolerances
from vlmbuild.golden.cases import MEASURED
from vlmbuild.golden.compare import Limits, StageResult, compare
from vlmbuild.golden.record import GoldenRecord, record_artifact
from vlmbuild.golden.stages import PIXELS, TOKENS
from vlmbuild.quant.spec import QuantSpec
from vlmbuild.util.progress import Progress, silent

_WIDE = 0.1
"""Tolerance of a build from which on an exported model rounds inputs."""


def judge(
    directory: Path,
    manifest: Manifest,
    engine: Engine,
    records: Sequence[GoldenRecord],
    answers: Answers,
    progress: Progress = silent,
) -> tuple[list[StageResult], list[str]]:
    """Compare an engine's answers with golden cases.

    Where its pixels differ within their tolerance, as those of another library for images do, and a later stage differs, the
    case is compared again with what the program makes of the engine's pixels.

    Args:
        directory: The artifact.
        manifest: Its manifest.
        engine: The engine.
        records: The cases.
        answers: Its answers to them.
        progress: Called with the number of passes over the weights that are done.

    Returns:
        The results in the order of the stages, and the names of the cases that were compared again.
    """
    limits = limits_on(engine, manifest, answers.dtype)
    results = compare(records, answers.cases, limits)
    again = [number for number, record in enumerate(records) if _by_pixels(record.case.name, results)]
    if not again:
        return results, []
    cases = [replace(records[number].case, pixels=answers.cases[number].values[PIXELS]) for number in again]
    judged = list(records)
    made = record_artifact(directory, manifest.target, cases, progress=progress)
    for number, record in zip(again, made, strict=True):
        samples = {**record.samples, PIXELS: records[number].samples[PIXELS]}
        judged[number] = replace(record, samples=samples)
    return compare(judged, answers.cases, limits), [case.name for case in cases]


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
    exported = [record for record in manifest.numerics if not record["case"].startswith(MEASURED)]
    if any(record["tolerance"] and float(record["tolerance"]) >= _WIDE for record in exported):
        vision = language = max(language, tolerances.ROUNDED_BLOCKS)
    return engine.limits(dtype or str(manifest.recipe["dtype"]), vision=vision, language=language)


def _by_pixels(case: str, results: Sequence[StageResult]) -> bool:
    """Tell whether a case differs behind pixels that nearly agree, and there alone."""
    mine = [result for result in results if result.case == case]
    before = {result.stage: result.verdict for result in mine if result.stage in (TOKENS, PIXELS)}
    differs = any(result.verdict == "differs" for result in mine)
    return differs and before.get(PIXELS) == "within" and before.get(TOKENS) != "differs"

"""Compare what an engine computes with golden cases: every stage that it shows, and the first that differs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vlmbuild.golden import tolerances
from vlmbuild.golden.record import GoldenRecord
from vlmbuild.golden.sample import Sample, difference, sample
from vlmbuild.golden.stages import EMBEDDINGS, FEATURES, GREEDY, LOGITS, PATCHES, PIXELS, TOKENS, stage_key

_BEFORE_LANGUAGE = (PATCHES, FEATURES, EMBEDDINGS)


@dataclass(frozen=True, slots=True)
class Answer:
    """Results of an engine on one case; stages that it does not show are missing.

    Attributes:
        tokens: Tokens of the prompt.
        values: Values by stage, rows in the order of the tokens; logits of the last positions.
        greedy: Generated tokens.
        log_probabilities: Log-probabilities of some tokens at the end of the prompt.
        failed: Stage at which the engine gave up, and its message.
    """

    tokens: Sequence[int] | None = None
    values: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    greedy: Sequence[int] | None = None
    log_probabilities: Mapping[int, float] = field(default_factory=dict)
    failed: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Tolerances of an engine on an artifact.

    Attributes:
        tower: Tolerance of what the tower computes.
        text: Tolerance of what the language model makes of it.
        pixels: Tolerance of the processor's pixels.
    """

    tower: float
    text: float
    pixels: float = tolerances.PIXELS


@dataclass(frozen=True, slots=True)
class StageResult:
    """The comparison of one stage of one case.

    Attributes:
        case: Name of the case.
        stage: Name of the stage.
        error: Relative error; infinite for another shape.
        tolerance: The largest error that is no difference.
        note: What differs, where a number does not say it.
    """

    case: str
    stage: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def verdict(self) -> str:
        """Equal, within the tolerance, or different."""
        return "differs" if not self.error <= self.tolerance else "within" if self.error else "equal"

    def document(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return {
            "case": self.case,
            "stage": self.stage,
            "error": f"{self.error:.1e}",
            "tolerance": f"{self.tolerance:.1e}",
            "verdict": self.verdict,
            "note": self.note,
        }


def compare(records: Sequence[GoldenRecord], answers: Sequence[Answer], limits: Limits) -> list[StageResult]:
    """Compare all cases, in the order of the stages."""
    results = [
        result for record, answer in zip(records, answers, strict=True) for result in _compare(record, answer, limits)
    ]
    return sorted(results, key=lambda result: stage_key(result.stage))


def first_difference(results: Sequence[StageResult]) -> StageResult | None:
    """Return the result of the first stage that differs, the worst of its cases; None where none does."""
    different = [result for result in results if result.verdict == "differs"]
    first = [result for result in different if result.stage == different[0].stage]
    return max(first, key=lambda result: result.error, default=None)


def worst_by_stage(results: Sequence[StageResult]) -> list[StageResult]:
    """Keep the worst result of each stage, by its share of the tolerance."""
    worst: dict[str, StageResult] = {}
    for result in results:
        known = worst.get(result.stage)
        if known is None or _share(result) > _share(known):
            worst[result.stage] = result
    return list(worst.values())


def _share(result: StageResult) -> float:
    return result.error / result.tolerance if result.tolerance else math.inf if result.error else 0.0


def _compare(record: GoldenRecord, answer: Answer, limits: Limits) -> Iterator[StageResult]:
    name = record.case.name
    if answer.tokens is not None:
        yield _tokens(record, answer.tokens)
    wider = 0.0
    if PIXELS in record.samples and PIXELS not in answer.values:
        wider = tolerances.UNSEEN_PIXELS
    for stage, expected in record.samples.items():
        if stage not in answer.values:
            continue
        found, expected = _same_width(stage, answer.values[stage], expected)
        error = difference(found, expected)
        shape = f"shape {found.shape}, not {expected.shape}" if found.shape != expected.shape else ""
        if stage == PIXELS:
            yield StageResult(name, stage, error, limits.pixels, shape)
        else:
            limit = limits.tower if stage in _BEFORE_LANGUAGE else limits.text
            yield StageResult(name, stage, error, limit + wider, shape)
    compute = limits.text + wider
    if LOGITS not in answer.values and answer.log_probabilities:
        yield _log_probabilities(record, answer, compute)
    if answer.greedy is not None:
        yield _greedy(record, answer.greedy, compute)
    if answer.failed is not None:
        stage, message = answer.failed
        yield StageResult(name, stage, math.inf, compute, message)


def _same_width(stage: str, value: npt.NDArray[np.float32], expected: Sample) -> tuple[Sample, Sample]:
    """Sample a value; embeddings of an engine may be followed by features for later layers."""
    return sample(stage, value, expected.shape[1] if stage in (FEATURES, EMBEDDINGS) else None), expected


def _tokens(record: GoldenRecord, found: Sequence[int]) -> StageResult:
    expected, name = record.tokens, record.case.name
    wrong = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
    if wrong is not None:
        different = sum(a != b for a, b in zip(found, expected, strict=False)) + abs(len(found) - len(expected))
        note = f"token {wrong} is {found[wrong]}, not {expected[wrong]}"
        return StageResult(name, TOKENS, different / len(expected), 0.0, note)
    if len(found) != len(expected):
        return StageResult(name, TOKENS, 1.0, 0.0, f"{len(found)} tokens, not {len(expected)}")
    return StageResult(name, TOKENS, 0.0, 0.0)


def _log_probabilities(record: GoldenRecord, answer: Answer, compute: float) -> StageResult:
    shared = answer.log_probabilities.keys() & record.top.keys()
    errors = [abs(answer.log_probabilities[token] - record.top[token]) for token in shared]
    note = "" if shared else "none of the most probable tokens is among the engine's"
    limit = tolerances.LOG_PROBABILITY * compute
    return StageResult(record.case.name, LOGITS, max(errors, default=math.inf), limit, note)


def _greedy(record: GoldenRecord, found: Sequence[int], compute: float) -> StageResult:
    """Compare generated tokens up to the first that differs; where the two most probable are a tie, either may follow."""
    name, expected = record.case.name, record.greedy
    wrong = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
    if wrong is None:
        note = "" if len(found) >= len(expected) else f"{len(found)} tokens, not {len(expected)}"
        return StageResult(name, GREEDY, 1.0 if note else 0.0, 0.0, note)
    if record.margins[wrong] <= tolerances.TIE * compute:
        return StageResult(name, GREEDY, 0.0, 0.0, f"token {wrong} is one of two that are equal within the tolerance")
    note = f"token {wrong} is {found[wrong]}, not {expected[wrong]}"
    return StageResult(name, GREEDY, (len(expected) - wrong) / len(expected), 0.0, note)

"""Samples of values: a few kilobytes that tell whether two arrays are equal, and by how much they differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlmbuild.golden.stages import LOGITS, PIXELS, UNORDERED

Floats = npt.NDArray[np.float32]
_ROWS, _COLUMNS, _PIXELS, _LOGITS = 12, 64, 2048, 512
LAST = 4
"""Positions at the end of a prompt whose logits are compared."""
_DIRECTIONS, _QUANTILES = (1.3, 2.1, 3.7, 5.9), 128


@dataclass(frozen=True, slots=True)
class Sample:
    """Part of a stage's value.

    Attributes:
        shape: Shape of the whole, (rows, columns).
        values: float32 (rows, columns) of the part.
        norm, mean: Norm and mean of the whole.
    """

    shape: tuple[int, int]
    values: Floats
    norm: float
    mean: float


def sample(stage: str, value: npt.NDArray[np.generic], width: int | None = None) -> Sample:
    """Take the sample of a stage's value.

    Rows whose order is the engine's own are projected onto a few fixed directions, and the projections sorted, which no order
    changes.

    Args:
        stage: Name of the stage.
        value: Rows are all but the last axis; pixels are one row.
        width: Leading columns that count; None is all of them.
    """
    array = np.asarray(value, np.float32)
    rows = array.reshape(1, -1) if stage == PIXELS else array.reshape(-1, array.shape[-1])[:, :width]
    if stage == LOGITS:
        rows = rows[-LAST:]
    wide = rows.astype(np.float64)
    return Sample(
        (len(rows), rows.shape[1]),
        _sorted(wide) if stage in UNORDERED else _slice(stage, rows),
        float(np.linalg.norm(wide)),
        float(wide.mean()),
    )


def difference(found: Sample, expected: Sample) -> float:
    """Return the relative error: of the worst row of the part, or of the norm of the whole; infinite for another shape, and
    for values that are no numbers."""
    if found.shape != expected.shape:
        return math.inf
    mine, theirs = (part.values.astype(np.float64) for part in (found, expected))
    least = 1e-6 * np.sqrt(np.square(theirs).mean()) + 1e-30  # a row of zeros
    scale = np.linalg.norm(theirs, axis=1) + least
    error = float((np.linalg.norm(mine - theirs, axis=1) / scale).max())
    error = max(error, abs(found.norm - expected.norm) / (expected.norm + 1e-30))
    return error if math.isfinite(error) else math.inf


def _sorted(rows: npt.NDArray[np.float64]) -> Floats:
    directions = np.cos(np.outer(np.arange(rows.shape[1]), _DIRECTIONS))
    ordered = np.sort(rows @ directions, axis=0)
    return np.ascontiguousarray(ordered[_spread(len(rows), _QUANTILES)].T, np.float32)


def _slice(stage: str, rows: Floats) -> Floats:
    most = {PIXELS: (1, _PIXELS), LOGITS: (LAST, _LOGITS)}.get(stage, (_ROWS, _COLUMNS))
    chosen = (_spread(size, count) for size, count in zip(rows.shape, most, strict=True))
    return np.ascontiguousarray(rows[np.ix_(*chosen)])


def _spread(size: int, most: int) -> npt.NDArray[np.int64]:
    """Return at most so many indices, evenly from the first to the last."""
    return np.linspace(0, size - 1, min(size, most)).round().astype(np.int64)

"""What every target is given: the finished program, and where its weights and files come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlmbuild.artifact.checkpoint import CheckpointWeights
from vlmbuild.families import Family
from vlmbuild.pipeline import PassReport
from vlmbuild.program import Program
from vlmbuild.recipe import Recipe
from vlmbuild.source import Source

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the bytes or steps done, and their total."""


@dataclass(frozen=True, slots=True)
class Request:
    """A build whose graph is finished.

    Attributes:
        program: After its passes.
        reports: Of the passes.
        family: The program's family.
        config: Values of the source's config.json.
        recipe: What was asked for.
        source: Where files come from.
        weights: The source's tensors.
        progress: Told how far writing has come.
    """

    program: Program
    reports: tuple[PassReport, ...]
    family: Family
    config: dict[str, Any]
    recipe: Recipe
    source: Source
    weights: CheckpointWeights
    progress: Progress

"""What every target is given: the finished program, and where its weights and files come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmbuild.artifact.checkpoint import CheckpointWeights
from vlmbuild.artifact.weights import TensorSpec
from vlmbuild.families import Family
from vlmbuild.pipeline import PassReport
from vlmbuild.program import Program, WeightRecipe
from vlmbuild.recipe import Recipe
from vlmbuild.source import Progress, Source

Job = tuple[str, WeightRecipe | None, tuple[TensorSpec, ...]]
"""(module name of the source tensor, its recipe or None to copy, what is stored)."""


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

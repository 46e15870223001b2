"""The program of an artifact after each pass: traced again from its config.json, and finally as it is stored."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.builder.passes import exact_passes
from vlmbuild.builder.tracing import Traced, artifact_config_values, trace
from vlmbuild.ir.printer import digest
from vlmbuild.ir.program import Program, Region
from vlmbuild.ir.shapes import annotate_shapes
from vlmbuild.recipe import Recipe
from vlmbuild.rewrite.pass_manager import run
from vlmbuild.runtime.bind import read_program
from vlmbuild.util.progress import Progress

CAPTURED, STORED = "captured", "stored"


@dataclass(frozen=True, slots=True)
class Staged:
    """An artifact with its stages.

    Attributes:
        recipe: The artifact's recipe.
        traced: Its model, traced by this version of vlmbuild.
        stages: Stage -> program: "captured", the exact passes by name, and "stored", the artifact's own.
    """

    recipe: Recipe
    traced: Traced
    stages: dict[str, Program]

    def changes(self) -> Iterator[tuple[str, list[tuple[Region, Region]]]]:
        """Yield each stage after the first with the regions that it changed: (before, after).

        A region that a pass has split is compared with the one that it came from.
        """
        programs = list(self.stages.items())
        for (_, before), (stage, after) in itertools.pairwise(programs):
            pairs = [
                (before.regions.get(name) or before.regions[_origin(name)], region)
                for name, region in after.regions.items()
            ]
            yield stage, [pair for pair in pairs if digest(pair[0]) != digest(pair[1])]


def stages_of(path: Path, progress: Progress | None = None) -> Staged:
    """Read an artifact and trace its model again.

    Raises:
        IntegrityError, IncompatibleError: It cannot be read.
        CaptureError: This vlmbuild cannot trace its model.
    """
    reader = ArtifactReader(path, verify=False)
    recipe = Recipe.from_mapping(reader.manifest.recipe, str(path))
    traced = trace(artifact_config_values(reader), "artifact", progress)
    stages = {CAPTURED: traced.program}
    program = copy.deepcopy(traced.program)
    for step in exact_passes(recipe):
        run([step], program)
        stages[step.name] = copy.deepcopy(program)
    stored = read_program(reader)
    annotate_shapes(stored)
    return Staged(recipe, traced, {**stages, STORED: stored})


def _origin(name: str) -> str:
    """Return the name of the region that "layers/2" was split from."""
    return name.partition("/")[0]

"""The program of an artifact before and after each pass: traced again from its config.json, and at last as it is stored."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.builder.build import exact_passes
from vlmbuild.builder.tracing import Traced, trace
from vlmbuild.checkpoint.source import Progress
from vlmbuild.ir.printer import digest
from vlmbuild.ir.program import Program, Region
from vlmbuild.ir.shapes import annotate_shapes
from vlmbuild.recipe import Recipe
from vlmbuild.rewrite.pass_manager import run
from vlmbuild.runtime.bind import read_program

CAPTURED, STORED = "captured", "stored"


@dataclass(frozen=True, slots=True)
class Staged:
    """An artifact with its stages.

    Attributes:
        manifest: The artifact's.
        recipe: What it was built by.
        traced: Its model, traced by this vlmbuild.
        stages: Stage -> program: "captured", the exact passes by name, and "stored", the artifact's own.
    """

    manifest: Manifest
    recipe: Recipe
    traced: Traced
    stages: dict[str, Program]

    def regions_of(self, name: str) -> dict[str, Region]:
        """Stage -> a region, for those stages that changed it. A region that a pass has divided starts where it came from."""
        found: dict[str, Region] = {}
        last = ""
        for stage, program in self.stages.items():
            region = program.regions.get(name) or program.regions.get(_origin(name, program))
            if region is not None and digest(region) != last:
                found[stage], last = region, digest(region)
        return found


def stages_of(path: Path, progress: Progress | None = None) -> Staged:
    """Read an artifact, and trace its model once more.

    Raises:
        IntegrityError, IncompatibleError: It cannot be read.
        CaptureError: This vlmbuild cannot trace its model.
    """
    reader = ArtifactReader(path, verify=False)
    values: dict[str, Any] = json.loads(reader.read("config.json"))
    values.pop("quantization_config", None)
    recipe = Recipe.from_mapping(reader.manifest.recipe, str(path))
    traced = trace(values, "artifact", progress)
    stages = {CAPTURED: traced.program}
    program = copy.deepcopy(traced.program)
    for step in exact_passes(recipe):
        run([step], program)
        stages[step.name] = copy.deepcopy(program)
    stored = read_program(reader)
    annotate_shapes(stored)
    return Staged(reader.manifest, recipe, traced, {**stages, STORED: stored})


def _origin(name: str, program: Program) -> str:
    """The region that a divided one, "layers_2", was taken from."""
    return max((other for other in program.regions if name.startswith(other)), key=len, default="")

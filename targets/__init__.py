"""Targets: kinds of artifacts, by the recipe's `target`, and all that the builder must know of each.

A new one is a folder here with its writer, a row in `TARGETS` below, and a row in each table of facts that lower folders
need: `vlmbuild.recipe.TARGET_OPTIONS` (the options of its recipes) and `vlmbuild.runtime.load.OPENERS` (how it is loaded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.errors import IncompatibleError
from vlmbuild.families import Family
from vlmbuild.ir.program import Program
from vlmbuild.measure.aoti_parity import code_measurement
from vlmbuild.measure.numerics import Measurement
from vlmbuild.measure.onnx_parity import onnx_measurement
from vlmbuild.recipe import Recipe
from vlmbuild.targets import aoti, compressed_tensors, gguf, onnx, trainable
from vlmbuild.targets.request import PlannedFile, Request, StoredParameter

Write = Callable[[ArtifactWriter, Request], Manifest]
"""Writes and publishes an artifact."""


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of artifact. The options that its recipes may have are in `vlmbuild.recipe.TARGET_OPTIONS`.

    Attributes:
        begin: Context of a build, entered before the model is captured; gives the function that writes.
        stored_parameters: (program, family, recipe) -> parameters that a finished program's artifact will store, before
            any weight is read; None for a target that cannot train.
        planned_files: (program, family, config, recipe) -> files of weights in their place; a target with neither of the
            two cannot be planned.
        measurement: (artifact, dtype) -> the comparison of exported code with the program; None where nothing is exported.
        devices: Types of devices that can quantize its weights.
        golden: True if its artifacts can hold golden cases.
        check: Raises UsageError for a recipe that the target builds nothing from.
    """

    begin: Callable[[], AbstractContextManager[Write]]
    stored_parameters: Callable[[Program, Family, Recipe], Iterator[StoredParameter]] | None = None
    planned_files: Callable[[Program, Family, Any, Recipe], Iterator[PlannedFile]] | None = None
    measurement: Callable[[Path, str], Measurement] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    golden: bool = True
    check: Callable[[Recipe], None] = lambda recipe: None


TARGETS: dict[str, Target] = {
    "trainable": Target(
        begin=lambda: nullcontext(trainable.write),
        stored_parameters=trainable.stored_parameters,
    ),
    "onnx": Target(
        begin=onnx.writing,
        planned_files=onnx.planned_files,
        measurement=onnx_measurement,
    ),
    "aoti": Target(
        begin=aoti.writing,
        measurement=code_measurement,
        devices=("cpu",),
        golden=False,
    ),
    "compressed-tensors": Target(
        begin=compressed_tensors.writing,
        check=compressed_tensors.check,
    ),
    "gguf": Target(
        begin=gguf.writing,
        devices=("cpu",),
    ),
}


def target_named(name: str) -> Target:
    """Return the row of a manifest's target. Raises IncompatibleError when this vlmbuild does not know it."""
    if name not in TARGETS:
        raise IncompatibleError(
            f"Unknown target {name!r}; this vlmbuild knows {', '.join(TARGETS)}. Install one that knows it, or pass "
            "--plugin NAME."
        )
    return TARGETS[name]


__all__ = ["TARGETS", "Request", "Target", "Write", "target_named"]

"""A target: one kind of artifact, and all that the builder must know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.families import Family
from vlmbuild.ir.program import Program
from vlmbuild.measure.numerics import Measurement
from vlmbuild.recipe import Recipe
from vlmbuild.targets.request import Request, StoredParameter

Write = Callable[[ArtifactWriter, Request], Manifest]
"""Writes and publishes an artifact."""


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of artifact. The options that its recipes may have are in `vlmbuild.recipe.TARGET_OPTIONS`.

    Attributes:
        begin: Context of a build, entered before the model is captured; gives the function that writes.
        stored_parameters: (program, family, recipe) -> parameters that a finished program's artifact will store, before
            any weight is read; None for a target that cannot train, which `plan` is about.
        measurement: (artifact, dtype) -> the comparison of exported code with the program; None where nothing is exported.
        devices: Types of devices that can quantize its weights.
    """

    begin: Callable[[], AbstractContextManager[Write]]
    stored_parameters: Callable[[Program, Family, Recipe], Iterator[StoredParameter]] | None = None
    measurement: Callable[[Path, str], Measurement] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")

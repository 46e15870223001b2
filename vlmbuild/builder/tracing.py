"""A model as captured from its config alone, and copies of it after a recipe's passes. No weights are read."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.builder.build import apply_passes, trace_program
from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.families import Family
from vlmbuild.families.base import IGNORED_CONFIG_KEYS
from vlmbuild.ir.program import Program
from vlmbuild.recipe import Recipe
from vlmbuild.rewrite.pass_manager import PassReport
from vlmbuild.util.progress import Progress, silent

_MACHINE_KEYS = ("_name_or_path", "transformers_version", *IGNORED_CONFIG_KEYS)


@dataclass(frozen=True, slots=True)
class Traced:
    """A model as captured, before any pass; recipes are applied to copies of its program."""

    checkpoint: Checkpoint
    program: Program

    @property
    def family(self) -> Family:
        """The model family."""
        return self.checkpoint.family

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.checkpoint.config

    @property
    def values(self) -> dict[str, Any]:
        """The values of config.json that describe the model."""
        return portable(self.checkpoint.values)

    @property
    def uri(self) -> str:
        """The name of the source; says nothing about this machine."""
        return self.checkpoint.source.uri


def trace(values: Mapping[str, Any], uri: str, progress: Progress | None = None) -> Traced:
    """Capture a model from the values of its config.json.

    Args:
        values: Values of config.json.
        uri: Name of the source; says nothing about this machine.
        progress: Called with a stage's name, the amount done, and the total.

    Raises:
        SourceError: No family reads the config, or a value is not valid.
        CaptureError: The model cannot be traced.
    """
    checkpoint = Checkpoint.of_config(values, uri)
    return Traced(checkpoint, trace_program(checkpoint.family, checkpoint.config, progress or silent))


def apply_recipe(traced: Traced, recipe: Recipe) -> tuple[Program, tuple[PassReport, ...]]:
    """Apply the recipe's passes to a copy of the program; returns it with their reports."""
    program = copy.deepcopy(traced.program)
    reports, _ = apply_passes(program, traced.checkpoint, recipe, silent)
    return program, reports


def artifact_config_values(reader: ArtifactReader) -> dict[str, Any]:
    """Return the values of an artifact's config.json that say nothing of quantization."""
    values: dict[str, Any] = json.loads(reader.read("config.json"))
    values.pop("quantization_config", None)
    return values


def portable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config.json that describe the model, without traces of the machine or tool that wrote it."""
    return {
        key: portable(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in _MACHINE_KEYS
    }

"""A model as captured from its config alone, and copies of it after a recipe's passes. No weights are read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmbuild.builder.build import rewrite, trace_program
from vlmbuild.checkpoint.source import Progress
from vlmbuild.checkpoint.tensors import announced_formats, published_name
from vlmbuild.families import Family, family_of
from vlmbuild.families.base import IGNORED_CONFIG_KEYS
from vlmbuild.ir.program import Program
from vlmbuild.quant.decide import decide
from vlmbuild.recipe import Recipe
from vlmbuild.rewrite.pass_manager import PassReport

_MACHINE_KEYS = ("_name_or_path", "transformers_version", *IGNORED_CONFIG_KEYS)


@dataclass(frozen=True, slots=True)
class Traced:
    """A model as captured, before any pass; recipes are applied to copies of its program."""

    family: Family
    config: Any
    values: dict[str, Any]
    program: Program
    uri: str


def trace(values: Mapping[str, Any], uri: str, progress: Progress | None = None) -> Traced:
    """Capture a model from the values of its config.json.

    Args:
        values: Of config.json.
        uri: Names the source; says nothing about this machine.
        progress: Called with a stage's name, the amount done, and the total.

    Raises:
        SourceError: No family reads the config, or a value is not valid.
        CaptureError: The model cannot be traced.
    """
    family = family_of(values, uri)
    config = family.config(values)
    program = trace_program(family, config, progress or _untold)
    return Traced(family, config, portable(values), program, uri)


def apply_recipe(traced: Traced, recipe: Recipe) -> tuple[Program, tuple[PassReport, ...]]:
    """A copy of the program after the recipe's passes, and what they did."""
    program = copy.deepcopy(traced.program)
    stored = announced_formats(traced.family, traced.values, program, traced.uri)
    published = published_name(traced.family)
    reports, _ = rewrite(
        program, recipe, lambda: decide(program, recipe.quantize, stored=stored, published=published), _untold
    )
    return program, reports


def portable(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config.json that say something about the model, and not about where or by what it was written."""
    return {
        key: portable(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in _MACHINE_KEYS
    }


def _untold(_stage: str, _done: int, _total: int) -> None:
    return None

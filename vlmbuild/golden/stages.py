"""Stages of a model: where their values are in a program, and in modules of transformers' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vlmbuild.families import Family
from vlmbuild.ir.program import Call, Program, Variant
from vlmbuild.kv_cache.program import CROSS

TOKENS, PIXELS, PATCHES, FEATURES = "tokens", "pixels", "patches", "features"
EMBEDDINGS, HIDDEN, LOGITS, GREEDY = "embeddings", "hidden", "logits", "greedy"
_ORDER = (TOKENS, PIXELS, PATCHES, FEATURES, EMBEDDINGS, HIDDEN, LOGITS, GREEDY)
UNORDERED = (PATCHES, FEATURES)
"""Stages whose rows an engine may order as it likes: a tower's patches may be grouped by the features that they become."""


def stage_key(stage: str) -> tuple[int, int]:
    """Return a stage's place in the order of computation: "hidden.3" comes after "embeddings" and before "hidden.12"."""
    kind, _, layer = stage.partition(".")
    return _ORDER.index(kind), int(layer or 0)


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a stage's value.

    Attributes:
        value: Name in the variant of the program.
        module: Module of the published model.
        side: "input" for the module's first argument, "output" for its result.
    """

    value: str
    module: str
    side: Literal["input", "output"]


def places(program: Program, family: Family, variant: Variant) -> dict[str, Place]:
    """Find the stages that a variant computes, by the module paths of its calls; of language blocks the first, the middle
    and the last.

    Args:
        program: With a key-value cache.
        family: The program's family.
        variant: One of its variants for prompts.
    """
    images = _from_images(variant)
    blocks = [call for call in variant.calls if call.instance]
    language = [c for c in blocks if c.instance.startswith(family.language_prefix) and not images.issuperset(c.inputs)]
    tower = [c for c in blocks if c.instance.startswith(family.vision_prefix)]
    found = {}
    if tower:
        found[PATCHES] = Place(tower[0].inputs[0], tower[0].instance, "input")
        found[FEATURES] = Place(_features(variant), family.projector_prefix.removesuffix("."), "output")
    first = language[0]
    found[EMBEDDINGS] = Place(first.inputs[0], first.instance, "input")
    for call in dict.fromkeys((first, language[len(language) // 2], language[-1])):
        found[f"{HIDDEN}.{_number(call)}"] = Place(call.outputs[0], call.instance, "output")
    return found


def modules(found: Mapping[str, Place]) -> dict[str, tuple[str, str]]:
    """Map each stage to its module, and to the side of it where the value is."""
    return {stage: (place.module, place.side) for stage, place in found.items()}


def _from_images(variant: Variant) -> set[str]:
    """Return the names of values that depend on images alone, inputs included."""
    names = {entry.name for entry in variant.inputs if not entry.is_about_tokens()}
    for call in variant.calls:
        if names.issuperset(call.inputs):
            names.update(call.outputs)
    return names


def _features(variant: Variant) -> str:
    """Return the name of the features that the language model reads, before its own projections."""
    given = {entry.name for entry in variant.inputs}
    for call in variant.calls:
        if any(name.startswith(CROSS) for name in call.outputs):  # keys and values of cross-attention
            return next(name for name in call.inputs if name not in given)
    return variant.image_values()[0]


def _number(call: Call) -> int:
    return int(call.instance.rpartition(".")[2])

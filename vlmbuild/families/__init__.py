"""The supported model families, by name.

A new family takes one module here that satisfies `Family` (`base.py` says what each member is for), one line in
`FAMILIES`, and one test module, `tests/families/test_<name>.py`. An entry in `SETUPS` of `tests/helpers/matrix.py` (a
tiny config and a real processor) runs the tests that hold for every family. What to write, in order:

1. `config` and `_check`: read config.json, refuse what would be captured wrongly.
2. The core modules (`core.py`): transformers' own layers, called with tensors only; nothing in them may depend on data.
3. `prepare`: everything that depends on data, on the host, packed (`batch.py`); name the sample in every refusal.
4. `variants`: the inputs of the core modules, with names for the sizes that change.
5. `Names`: published tensor names and module names; `role`: what each parameter does.
6. `processor`, `image_cost`, `batch_sizes`, and for the collator `processors`, `limits`, `media_tokens`, `image_tokens`.

Nothing that builds, stores or runs a model knows a family's name; the zoo, the demo and examples in help texts do. If a pass
does not match, it is the pass that learns a new pattern.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmbuild.errors import IncompatibleError, SourceError, UsageError
from vlmbuild.families.base import Family, ImageCost, InputLayout, KeyGroups, PackedBatch
from vlmbuild.families.batch import check_ids
from vlmbuild.families.js import ClientVision
from vlmbuild.families.mllama.family import Mllama
from vlmbuild.families.pixtral.family import Pixtral
from vlmbuild.families.qwen2_vl.family import Qwen2VL

FAMILIES: dict[str, Family] = {family.name: family for family in (Mllama(), Pixtral(), Qwen2VL())}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family that reads a config.json.

    Raises:
        SourceError: None does; the message lists the supported architectures.
    """
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise SourceError(f"{where}: architectures must be a list of names, not {named!r}.")
    for family in FAMILIES.values():
        if any(architecture in family.architectures for architecture in named):
            return family
    supported = ", ".join(f"{name} ({family.title})" for family in FAMILIES.values() for name in family.architectures)
    found = ", ".join(map(str, named)) or f"model_type {config.get('model_type')!r} without architectures"
    raise SourceError(f"{where}: unknown architecture {found}. vlmbuild builds: {supported}.")


def family_named(name: str) -> Family:
    """The family that a program names.

    Raises:
        IncompatibleError: This version of vlmbuild does not know it.
    """
    family = FAMILIES.get(str(name))
    if family is None:
        known = ", ".join(FAMILIES)
        raise IncompatibleError(
            f"Unknown model family {name!r}; this vlmbuild knows {known}. Install one that knows it."
        )
    return family


def family_of_processor(processor: Any) -> Family:
    """The family whose processor this is.

    Raises:
        UsageError: It is none's; often a tokenizer alone.
    """
    name = type(processor).__name__
    for family in FAMILIES.values():
        if name in family.processors:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.processors)
    raise UsageError(f"Expected the processor that vlmbuild.load returns ({known}), not a {name}.")


__all__ = [
    "FAMILIES",
    "ClientVision",
    "Family",
    "ImageCost",
    "InputLayout",
    "KeyGroups",
    "PackedBatch",
    "check_ids",
    "family_named",
    "family_of",
    "family_of_processor",
]

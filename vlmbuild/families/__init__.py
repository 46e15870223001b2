"""The supported model families, by name. A new family is one module here with an instance of `Family`, and one line below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmbuild.errors import IncompatibleError, SourceError
from vlmbuild.families._family import Family, HostBatch, KeyGroups
from vlmbuild.families.qwen2_vl import Qwen2VL

FAMILIES: dict[str, Family] = {family.name: family for family in (Qwen2VL(),)}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family that reads a config.json.

    Raises:
        SourceError: None does; the message lists the supported architectures.
    """
    named = config.get("architectures") or []
    for family in FAMILIES.values():
        if any(architecture in family.architectures for architecture in named):
            return family
    supported = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
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


__all__ = ["FAMILIES", "Family", "HostBatch", "KeyGroups", "family_named", "family_of"]

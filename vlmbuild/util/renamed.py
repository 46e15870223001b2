"""Names that stored files of an earlier schema have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PASSES = {"fuse_mrope": "fuse_rope"}
"""Pass in schema 1 of manifests, locks and recipes -> its name now."""

CACHE_FORMS = {"growing": "dynamic"}
"""Form of a key-value cache in code indexes of artifacts of schema 1 -> its name now."""


def current_names(values: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Return a mapping with its keys as they are called now."""
    return {renamed.get(key, key): value for key, value in values.items()}

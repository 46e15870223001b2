"""Checks of an image processor's settings: numbers in their ranges, and pixels within the limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmbuild.errors import SourceError
from vlmbuild.util.pixels import VARIABLE, max_pixels

_SIDES = {"patch_size": 1024, "merge_size": 64, "temporal_patch_size": 64, "max_image_tiles": 64}
"""Setting -> its highest value; each is a whole number, at least 1."""


def check_processor(images: Any, pixels: int, directory: Path) -> None:
    """Raise SourceError for settings of an image processor that cannot be computed with.

    Args:
        images: transformers' image processor.
        pixels: Most pixels that it makes of an image.
        directory: Its directory, for messages.
    """
    settings = {name: getattr(images, name, None) for name in (*_SIDES, "image_mean", "image_std", "rescale_factor")}
    settings |= {f"size[{key}]": value for key, value in dict(images.size).items() if value is not None}
    for name, value in settings.items():
        entries = _entries(value)
        if not all(entry is None or _fits(name, entry) for entry in entries):
            raise SourceError(
                f"The image processor in {directory} has {name} {value!r}. Restore the published settings."
            )
    if pixels > max_pixels():
        raise SourceError(
            f"The image processor in {directory} makes up to {pixels:,} pixels of an image, more than {max_pixels():,} (size "
            f"{dict(images.size)}). Restore the published size, or set the environment variable {VARIABLE}."
        )


def _fits(name: str, value: Any) -> bool:
    """Tell whether a number lies in the range of a setting."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    if name in _SIDES or name.startswith("size["):
        return isinstance(value, int) and 1 <= value <= _SIDES.get(name, 2**62)
    return value > 0 or name == "image_mean"


def _entries(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]

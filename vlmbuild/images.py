"""Images of samples, given or named: reading them, and their size without decoding them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import PIL.Image
from transformers.image_utils import get_image_size, load_image

from vlmbuild.errors import BatchError

_ORIENTATION = 0x0112
_TURNED = 5
"""EXIF's tag for how a camera was held; from this value on, height and width change places."""


def load(image: Any, where: str) -> Any:
    """The image, read if it is a path or an address.

    Raises:
        BatchError: It cannot be read; `where` names the sample.
    """
    if not isinstance(image, str | os.PathLike):
        return image
    try:
        return load_image(str(image))
    except (OSError, ValueError) as error:
        raise BatchError(f"{where}: the image {str(image)[:200]} cannot be read: {error}") from error


def image_size(image: Any, where: str) -> tuple[int, int]:
    """Height and width, as the processor will see them; no pixel is decoded.

    Raises:
        BatchError: It cannot be read; `where` names the sample.
    """
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    if not isinstance(image, str | os.PathLike):
        height, width = get_image_size(np.asarray(image))
        return int(height), int(width)
    try:
        with PIL.Image.open(image) as opened:
            turned = opened.getexif().get(_ORIENTATION, 1) >= _TURNED
            return (opened.width, opened.height) if turned else (opened.height, opened.width)
    except OSError:
        loaded = load(image, where)  # an address, or base64
        return loaded.height, loaded.width

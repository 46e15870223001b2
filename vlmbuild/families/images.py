"""Images of samples, given or named: reading them, and their size without decoding them."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
import torch
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
    if isinstance(image, PIL.Image.Image | np.ndarray | torch.Tensor):
        return image
    if isinstance(image, Mapping) and image.get("bytes") is not None:  # as data sets keep encoded images
        image = image["bytes"]
    try:
        if isinstance(image, bytes):
            return load_image(PIL.Image.open(io.BytesIO(image)))
        if isinstance(image, Mapping) and image.get("path") is not None:
            image = image["path"]
        if not isinstance(image, str | os.PathLike):
            raise ValueError(f"it is {type(image).__name__}, not an image, an array, bytes, a path or an address")
        return load_image(str(image))
    except Exception as error:  # files, addresses and decoders have errors of their own
        raise BatchError(f"{where}: the image {str(image)[:200]} cannot be read: {error}") from error


def image_size(image: Any, where: str) -> tuple[int, int]:
    """Height and width, as the processor will see them; no pixel is decoded.

    Raises:
        BatchError: It cannot be read; `where` names the sample.
    """
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    if isinstance(image, Mapping | bytes):
        loaded = load(image, where)
        return loaded.height, loaded.width
    if isinstance(image, np.ndarray | torch.Tensor):
        height, width = get_image_size(np.asarray(image))
        return int(height), int(width)
    if not isinstance(image, str | os.PathLike):
        load(image, where)  # says what it is
    try:
        with PIL.Image.open(image) as opened:
            turned = opened.getexif().get(_ORIENTATION, 1) >= _TURNED
            return (opened.width, opened.height) if turned else (opened.height, opened.width)
    except OSError:
        loaded = load(image, where)  # an address, or base64
        return loaded.height, loaded.width

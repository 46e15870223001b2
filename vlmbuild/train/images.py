"""Images of samples: opening them, and reading their size without decoding pixels."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers.image_utils import get_image_size, load_image

from vlmbuild.errors import BatchError

_ORIENTATION = 0x0112  # EXIF: how the camera was held
_SIDEWAYS = 5  # from this value on, height and width are exchanged


def open_image(image: Any, where: str) -> Any:
    """Read an image that is a path, an address, encoded bytes or {"bytes": ..., "path": ...}; return others as they are.

    Raises:
        BatchError: It cannot be read; `where` names the sample.
    """
    if isinstance(image, PIL.Image.Image | np.ndarray | torch.Tensor):
        return image
    source = image
    if isinstance(source, Mapping):  # data sets keep encoded images so
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    try:
        if isinstance(source, bytes):
            return load_image(PIL.Image.open(io.BytesIO(source)))
        if not isinstance(source, str | os.PathLike):
            raise ValueError(f"it is {type(source).__name__}, not an image, an array, bytes, a path or an address")
        return load_image(str(source))
    except Exception as error:  # files, addresses and decoders have errors of their own
        missing = isinstance(source, str | os.PathLike) and "://" not in str(source) and not Path(source).exists()
        reason = "there is no such file" if missing else str(error)
        raise BatchError(
            f"{where}: the image {str(image)[:200]} cannot be read: {reason}. Pass a file that Pillow opens."
        ) from error


def image_size(image: Any, where: str) -> tuple[int, int]:
    """Read height and width, as the processor will see them; no pixel is decoded where that can be avoided.

    Raises:
        BatchError: It cannot be read; `where` names the sample.
    """
    if isinstance(image, np.ndarray | torch.Tensor):
        height, width = get_image_size(np.asarray(image))
        return int(height), int(width)
    if isinstance(image, str | os.PathLike):
        try:
            with PIL.Image.open(image) as opened:
                sideways = opened.getexif().get(_ORIENTATION, 1) >= _SIDEWAYS
                return (opened.width, opened.height) if sideways else (opened.height, opened.width)
        except OSError:
            pass  # an address, or base64
    opened = open_image(image, where)
    return opened.height, opened.width

"""Images of samples: opening them, and reading their size without decoding pixels."""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import numpy as np
import PIL.Image
import torch
from transformers.image_utils import get_image_size, load_image

from vlmbuild.errors import BatchError
from vlmbuild.util.pixels import VARIABLE, max_pixels

_ORIENTATION = 0x0112  # EXIF: how the camera was held
_SIDEWAYS = 5  # from this value on, height and width are exchanged
_DOWNLOAD_SECONDS = 60.0
"""Time limit of a download."""
_DEEP = ("I", "F")
"""Beginnings of Pillow's modes with more than 8 bits; converting them to RGB would cut most of them to white."""


class ImageError(BatchError):
    """An image of a sample cannot be read or processed."""


def open_image(image: Any, where: str) -> Any:
    """Read an image: a path, an address, encoded bytes, a file, {"bytes": ..., "path": ...}, or a grey array.

    PIL images, colour arrays and tensors are returned as they are.

    Raises:
        ImageError: It cannot be read, or has more pixels than allowed; `where` names the sample.
    """
    if isinstance(image, PIL.Image.Image):
        return _checked(image, where)
    if isinstance(image, np.ndarray | torch.Tensor):
        return _colour(image, where)
    try:
        return load_image(_checked(_opened(image), where))
    except ImageError:
        raise
    except Exception as error:  # files, addresses and decoders have errors of their own
        path = isinstance(image, str | os.PathLike) and not str(image).startswith(("data:", "http://", "https://"))
        reason = "there is no such file" if path and isinstance(error, ValueError | FileNotFoundError) else str(error)
        raise ImageError(
            f"{where}: the image {str(image)[:200]} cannot be read: {reason}. Pass a file that Pillow opens."
        ) from error


def image_size(image: Any, where: str) -> tuple[int, int]:
    """Read height and width, as the processor will see them; no pixel of a file is decoded.

    Raises:
        ImageError: It cannot be read, or has more pixels than allowed; `where` names the sample.
    """
    if isinstance(image, str | os.PathLike):
        try:
            with _opened(image) as opened:
                _checked(opened, where)
                sideways = opened.getexif().get(_ORIENTATION, 1) >= _SIDEWAYS
                return (opened.width, opened.height) if sideways else (opened.height, opened.width)
        except ImageError:
            raise
        except Exception:  # noqa: S110 - open_image says what is wrong
            pass
    opened = open_image(image, where)
    if isinstance(opened, PIL.Image.Image):
        return opened.height, opened.width
    height, width = get_image_size(np.asarray(opened))
    return int(height), int(width)


def resized(image: Any, size: tuple[int, int], where: str) -> Any:
    """Resize an image to (height, width), bicubic."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[-1:] == (3,):
        image = PIL.Image.fromarray(image)
    if not isinstance(image, PIL.Image.Image):
        raise ImageError(
            f"{where}: an array with limits of its own must be uint8 (height, width, 3). Pass a PIL image."
        )
    return image.convert("RGB").resize((size[1], size[0]))


def _opened(image: Any) -> PIL.Image.Image:
    """Open an image's file; nothing is decoded."""
    source = image
    if isinstance(source, Mapping):  # the form in which datasets stores images
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, bytes):
        return PIL.Image.open(io.BytesIO(source))
    if hasattr(source, "read") and hasattr(source, "seek"):
        source.seek(0)
        return PIL.Image.open(source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"it is {type(source).__name__}, not an image, an array, bytes, a file, a path or an address")
    text = str(source)
    if text.startswith("data:image/"):
        return PIL.Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2], validate=True)))
    if text.startswith("file://"):
        return PIL.Image.open(unquote(urlsplit(text).path))
    if text.startswith(("http://", "https://")):
        return PIL.Image.open(io.BytesIO(_downloaded(text)))
    if os.path.exists(text):  # noqa: PTH110 - text of any length
        return PIL.Image.open(text)
    try:
        return PIL.Image.open(io.BytesIO(base64.decodebytes(text.encode())))
    except (ValueError, OSError) as error:
        raise FileNotFoundError(text) from error


def _downloaded(address: str) -> bytes:
    """Download an image, of at most the bytes that the largest allowed one has as RGBA. Raises ValueError, httpx.HTTPError."""
    limit, end = 4 * max_pixels(), time.monotonic() + _DOWNLOAD_SECONDS
    data = bytearray()
    # A compressed answer could unpack to anything.
    headers = {"Accept-Encoding": "identity"}
    with httpx.stream("GET", address, headers=headers, follow_redirects=True, timeout=_DOWNLOAD_SECONDS) as response:
        response.raise_for_status()
        for part in response.iter_raw():
            data += part
            if len(data) > limit:
                raise ValueError(
                    f"it has more than {limit:,} bytes; set the environment variable {VARIABLE} to allow more"
                )
            if time.monotonic() > end:
                raise ValueError(f"its download takes more than {_DOWNLOAD_SECONDS:g} s; download it yourself")
    return bytes(data)


def _checked(image: PIL.Image.Image, where: str) -> PIL.Image.Image:
    if image.width * image.height > max_pixels():
        raise ImageError(
            f"{where}: an image has {image.width} x {image.height} pixels, more than {max_pixels():,}. Make it smaller, or "
            f"set the environment variable {VARIABLE}."
        )
    if image.mode.startswith(_DEEP):
        raise ImageError(
            f'{where}: an image has Pillow\'s mode {image.mode}, more than 8 bits. Scale it to 8 bits and convert it to "RGB".'
        )
    return image


def _colour(image: Any, where: str) -> Any:
    """Make a colour image of a grey array, or of one with an alpha channel; return others as they are."""
    array = np.asarray(image)
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 1)
    alpha = array.ndim == 3 and array.shape[-1] == 4
    if array.ndim not in (2, 3) or ((grey or alpha) and array.dtype != np.uint8):
        raise ImageError(
            f"{where}: an image is an array of shape {array.shape} and {array.dtype}. Pass a PIL image, or uint8 values "
            "(height, width) or (height, width, 3)."
        )
    if not grey and not alpha:
        return image
    return PIL.Image.fromarray(array.squeeze(-1) if array.shape[-1:] == (1,) else array).convert("RGB")

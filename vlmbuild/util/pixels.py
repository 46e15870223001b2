"""The limit on pixels: small files can hold images of gigabytes, and a processor's settings can ask for them."""

from __future__ import annotations

import os

from vlmbuild.errors import UsageError

VARIABLE = "VLMBUILD_MAX_PIXELS"
"""Environment variable that replaces the limit."""
_DEFAULT = 100_000_000


def max_pixels() -> int:
    """Return the most pixels of an image that is read, and that a processor may make of one.

    Raises:
        UsageError: The environment variable is no positive number.
    """
    text = os.environ.get(VARIABLE, str(_DEFAULT))
    if not text.isdecimal() or not int(text):
        raise UsageError(f"{VARIABLE}={text!r} is no number of pixels. Set it to a whole number, at least 1.")
    return int(text)

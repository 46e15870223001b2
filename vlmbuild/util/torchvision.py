"""Errors of a torchvision that does not fit torch: it is optional, but transformers imports it wherever it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager

from vlmbuild.errors import IncompatibleError

_OFFSET = 15
"""torchvision 0.N is for torch 2.(N - 15)."""
_INDEXED = re.compile(r"2\.(\d+)[.\d]*(?:\+(cpu|cu\d+|rocm[\d.]+|xpu))?")
"""Versions of torch that pytorch.org serves: releases, for one kind of device."""


@contextmanager
def blame_torchvision() -> Iterator[None]:
    """Raise IncompatibleError in place of an error that an installed torchvision causes, which can be any import's."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        if (fault := _fault()) is None:
            raise
        import torch

        raise IncompatibleError(
            f"The installed torchvision does not fit torch {torch.__version__}: {fault}. "
            f"{remedy(torch.__version__)}; or remove it: pip uninstall torchvision."
        ) from error


def _fault() -> Exception | None:
    """Return what importing torchvision raises; None if it is not installed, too."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # missing operators, symbols or libraries
        return error
    return None


def remedy(version: str) -> str:
    """Tell how to install the torchvision of a version of torch: from the same index, if that build is on one."""
    served = _INDEXED.fullmatch(version)
    if served is None:
        return "Install the torchvision that was built for this torch"
    index = f" --index-url https://download.pytorch.org/whl/{served[2]}" if served[2] else ""
    line = f"pip install --force-reinstall --no-deps 'torchvision==0.{int(served[1]) + _OFFSET}.*'{index}"
    return f"Install the one that does: {line}"

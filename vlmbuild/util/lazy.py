"""Modules that are imported when they are first used: options can be checked and artifacts described without torch."""

from __future__ import annotations

import importlib
from typing import Any


class LazyModule:
    """A module, imported when an attribute is first read. Type checkers see the real import beside it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)

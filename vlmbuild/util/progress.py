"""Reports of the progress of long work."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the bytes or steps done, and their total."""


def silent(_stage: str, _done: int, _total: int) -> None:
    """Report no progress."""

"""Text in messages."""

from __future__ import annotations

import shutil
from collections.abc import Sequence


def listed(names: Sequence[str], most: int = 20) -> str:
    """List names, at most `most` of them, and say how many more there are.

    Names may come from a disk or a manifest that nobody has checked: control characters are shown escaped.
    """
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def terminal_width(most: int) -> int:
    """Return the columns of the terminal, 80 where there is none, within 40 and `most`."""
    return max(40, min(shutil.get_terminal_size().columns, most))

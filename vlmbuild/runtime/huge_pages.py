"""Huge pages of memory for weights, where the kernel gives them on request: each token reads all weights once, and ordinary
pages leave up to a quarter of the memory's bandwidth unused."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_COLLAPSE = 25
"""MADV_COLLAPSE, of Linux 6.1 and newer: bring a range into huge pages at once, also what is in memory already."""
_PAGE = 2 << 20
_LEAST = 2 * _PAGE
"""Below, a range may hold no whole huge page."""

Range = tuple[int, int]
"""(first address, end)."""


@contextmanager
def huge_pages() -> Iterator[None]:
    """Bring what is allocated in this block, in one piece and by whatever thread, into huge pages. Where the system has
    none, or no request for them, nothing happens."""
    before = dict(_allocated())
    yield
    for start, end in _allocated():
        known = before.get(start, start)
        if end > known:
            _collapse(known, end)


def _allocated() -> list[Range]:
    """The writable ranges of memory that no file is behind."""
    if sys.platform != "linux" or not _MAPS.exists():
        return []
    fields = (line.split() for line in _MAPS.read_text().splitlines())
    return [_range(parts[0]) for parts in fields if parts[1] == "rw-p" and parts[4] == "0"]


def _range(text: str) -> Range:
    start, end = (int(part, 16) for part in text.split("-"))
    return start, end


def _collapse(start: int, end: int) -> None:
    first, last = -(-start // _PAGE) * _PAGE, end // _PAGE * _PAGE
    if last - first < _LEAST:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _COLLAPSE)


def huge_bytes() -> int:
    """Memory of this process that lies in huge pages; 0 where the system does not say."""
    try:
        lines = Path(f"/proc/{os.getpid()}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages:"))

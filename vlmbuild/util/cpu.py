"""How many cores there are to work on, and threads of our own that share them with torch's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_MOST = 16


def available_cores() -> int:
    """Return the cores that this process may use, at most 16: beyond, disks and memory are the limit."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(_MOST, len(affinity(0)) if affinity else os.cpu_count() or 1)


@contextmanager
def single_threaded() -> Iterator[Callable[[], None]]:
    """Yield the initializer of a thread pool in which torch computes with one thread in each of ours.

    torch's number of threads is one for the process as far as new threads are concerned, so it is put back at the end.
    """
    before = torch.get_num_threads()
    try:
        yield lambda: torch.set_num_threads(1)
    finally:
        torch.set_num_threads(before)

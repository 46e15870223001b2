"""Pools of threads whose jobs end early when nobody waits for them any more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


class StoppedError(Exception):
    """Ends a job whose pool is closing."""


@contextmanager
def cancellable_pool(
    threads: int, start_thread: Callable[[], None] | None = None
) -> Iterator[tuple[ThreadPoolExecutor, Callable[[], None]]]:
    """Yield a pool, and a check that its jobs call between chunks of work.

    When the block ends, jobs that have not begun are dropped, and the check raises StoppedError in the others.
    """
    stopped = threading.Event()

    def check() -> None:
        if stopped.is_set():
            raise StoppedError

    with ThreadPoolExecutor(threads, initializer=start_thread) as pool:
        try:
            yield pool, check
        finally:
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)

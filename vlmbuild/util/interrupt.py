"""Signals that end a command, also when Python or a library swallows the exception that their handler raises."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TERMINATED = 143
_AGAIN_SECONDS = 0.02
_received: list[int] = []
"""The first SIGINT or SIGTERM of the present block."""


def check_interrupted() -> None:
    """Raise KeyboardInterrupt or SystemExit if a signal has come, for places that all stages pass through."""
    if _received:
        if _received[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(TERMINATED)


@contextmanager
def ending_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGINT and SystemExit for SIGTERM, so that partial output is removed on the way out.

    Later signals do not interrupt that. Python ignores what is raised in callbacks of weak references and in finalizers, in
    which a signal may arrive: it is raised again, from a timer. Signals that the parent process has set to be ignored stay so.
    """
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: object) -> None:
        if not _received:
            _received.append(number)
            check_interrupted()

    def ignored(unraisable: Any) -> None:
        if _received and isinstance(unraisable.exc_value, KeyboardInterrupt | SystemExit):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            hook(unraisable)

    hook, sys.unraisablehook = sys.unraisablehook, ignored
    previous = {number: signal.signal(number, stop) for number in numbers}
    previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, lambda *_: check_interrupted())
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
        _received.clear()

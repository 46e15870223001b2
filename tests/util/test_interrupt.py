"""A signal ends the work, wherever it arrives, and nothing interrupts the cleanup."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import weakref

import pytest

from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.util.interrupt import check_interrupted, ending_signals

ENDS = [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]


@pytest.fixture(autouse=True)
def interruptible():
    """SIGINT as in a terminal: shells start what they put into the background with SIGINT ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


class Thing:
    """An object that weak references can refer to."""

    def __init__(self, on_delete=None):
        self.on_delete = on_delete

    def __del__(self):
        if self.on_delete is not None:
            self.on_delete()


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the handler runs here


def in_a_weakref_callback(number):
    thing = Thing()
    reference = weakref.ref(thing, lambda _: send(number))
    del thing
    return reference


def in_a_finalizer(number):
    thing = Thing(lambda: send(number))
    del thing


@pytest.mark.parametrize("swallow", [in_a_weakref_callback, in_a_finalizer])
@pytest.mark.parametrize(("number", "kind"), ENDS)
def test_a_swallowed_signal_is_raised_again(number, kind, swallow):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    with pytest.raises(kind), ending_signals():
        swallow(number)
        time.sleep(10)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == handlers


@pytest.mark.parametrize(("number", "kind"), ENDS)
def test_nothing_is_published_after_a_signal_that_a_library_swallowed(number, kind, tmp_path):
    with pytest.raises(kind), ending_signals(), ArtifactWriter(tmp_path / "out") as writer:
        writer.write("a", b"a", "config")
        with contextlib.suppress(BaseException):
            send(number)
        writer.publish(name="m", target="trainable")
    assert os.listdir(tmp_path) == []
    check_interrupted()  # forgotten with the block


@pytest.mark.parametrize(("number", "kind"), ENDS)
def test_later_signals_do_not_interrupt_the_cleanup(number, kind):
    cleaned = []
    with pytest.raises(kind), ending_signals():
        try:
            send(number)
        finally:
            for later in (signal.SIGTERM, signal.SIGINT):
                send(later)
            cleaned.append(True)
    assert cleaned


IMPORTING = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "click":
            os.kill(os.getpid(), int(sys.argv[1]))
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
from vlmbuild.__main__ import run
run()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_import_shows_no_traceback(number, code):
    command = [sys.executable, "-c", IMPORTING, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert "interrupted" in done.stderr and "Traceback" not in done.stderr

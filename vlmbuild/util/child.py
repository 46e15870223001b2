"""A child process of our own, which gets ready at once, is asked once, and answers in lines."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Self

INHERITED_PLUGINS: list[str] = []
"""Names of the plugins that this process uses; its children use them too."""
_WITH_PLUGINS = "vlmbuild.builder.with_plugins"


class ChildProcess:
    """A context with the process `python -m MODULE ARGUMENTS`; afterwards neither it nor anything that it started is left.

    Args:
        module: A module of vlmbuild.
        arguments: Its arguments.
        settings: Environment variables besides this process's.
    """

    def __init__(self, module: str, *arguments: str, settings: Mapping[str, str] = MappingProxyType({})) -> None:
        launch = (_WITH_PLUGINS, ",".join(INHERITED_PLUGINS)) if INHERITED_PLUGINS else ()
        self._command = [sys.executable, "-m", *launch, module, *arguments]
        self._environment = {**os.environ, **settings}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._stderr = stack.enter_context(tempfile.TemporaryFile())  # a pipe that nobody reads would fill up
            self._process = subprocess.Popen(  # noqa: S603  (our own interpreter)
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env=self._environment,
                start_new_session=True,
            )
            stack.callback(self._end)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ask(self, text: str) -> None:
        """Write to its stdin, and close it; a process that has ended already says why in `last_words`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(text)

    def answers(self) -> Iterator[str]:
        """Yield the lines that it prints, until it ends."""
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            yield from lines

    def last_words(self) -> tuple[int, list[str]]:
        """Wait for its end; return its exit code, and the lines of its stderr."""
        code = self._process.wait()
        self._stderr.seek(0)
        return code, self._stderr.read().decode(errors="replace").strip().splitlines()

    def _end(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

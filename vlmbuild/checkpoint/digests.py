"""Digests of a source's files, taken in the background while the graph is captured."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from vlmbuild.artifact.files import hash_file
from vlmbuild.checkpoint.source import SIDE_FILES, Source
from vlmbuild.errors import SourceError
from vlmbuild.util.cpu import available_cores


class Digests:
    """A context in which the files that a build reads are hashed by other threads; leaving it early ends them.

    Attributes:
        futures: SHA-256 (hex) by path in the source. `result()` raises SourceError when the file cannot be read.
    """

    def __init__(self, source: Source, weight_files: Iterable[Path]) -> None:
        self._directory = source.directory
        self._files = [*source.files(("config.json", *SIDE_FILES)), *weight_files]
        self._stopped = threading.Event()
        self.futures: dict[str, Future[str]] = {}

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(available_cores())
        self.futures = {
            file.relative_to(self._directory).as_posix(): self._pool.submit(self._digest, file) for file in self._files
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _digest(self, file: Path) -> str:
        try:
            return hash_file(file, on_chunk=self._go_on)
        except OSError as error:
            raise SourceError(f"{file} cannot be read: {error.strerror}. Check the disk and permissions.") from error

    def _go_on(self, _: int) -> None:
        if self._stopped.is_set():
            raise _StoppedError


class _StoppedError(Exception):
    """Ends a thread whose digest nobody waits for any more."""

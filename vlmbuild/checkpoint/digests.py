"""Digests of a source's files, taken in background threads while the graph is captured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from vlmbuild.artifact.files import hash_file
from vlmbuild.errors import SourceError
from vlmbuild.util.cpu import available_cores
from vlmbuild.util.pool import cancellable_pool


@contextmanager
def hashing(directory: Path, files: Iterable[Path]) -> Iterator[Mapping[str, Future[str]]]:
    """Hash files in background threads; leaving the block cancels them.

    Yields the SHA-256 (hex) of each file by its path in the directory; `result()` raises SourceError when it cannot be read.
    """
    with cancellable_pool(available_cores()) as (pool, check):

        def digest(file: Path) -> str:
            try:
                return hash_file(file, on_chunk=lambda _: check())
            except OSError as error:
                raise SourceError(
                    f"{file} cannot be read: {error.strerror}. Check the disk and permissions."
                ) from error

        yield {file.relative_to(directory).as_posix(): pool.submit(digest, file) for file in files}

"""File system steps shared by reading and writing: opening without links, listing, hashing."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

CHUNK_BYTES = 2**20
_HASH_BYTES = 2**23
"""Hashed in one call: between calls a thread waits for its turn with whatever Python code runs beside it."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO would otherwise wait for a writer that never comes.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Identity:
    """Identity of one state of a file; a user cannot set ctime."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Return the identity of an open file."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass
class Listing:
    """All entries below a directory, sorted into what may be there and what may not."""

    files: dict[str, int] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    too_many: bool = False


@contextmanager
def open_directory(path: Path) -> Iterator[int]:
    """Open a directory as a descriptor; the last component may be a link, as the user's own name for it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def open_beneath(root: int, path: str) -> Iterator[int]:
    """Open a regular file under `root` as a descriptor; no component may be a link. Raises OSError."""
    *folders, name = path.split("/")
    directory = os.dup(root)
    try:
        for folder in folders:
            inner = os.open(folder, _DIRECTORY, dir_fd=directory)
            os.close(directory)
            directory = inner
        descriptor = os.open(name, _FILE, dir_fd=directory)
    finally:
        os.close(directory)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def list_tree(root: int, *, limit: int, depth: int) -> Listing:
    """List everything below `root` without following links, giving up past `limit` entries or `depth` folders."""
    listing = Listing()
    pending = [""]
    seen = 0
    while pending:
        folder = pending.pop()
        with _open_folder(root, folder) as descriptor, os.scandir(descriptor) as entries:
            count = 0
            for entry in entries:
                count, seen = count + 1, seen + 1
                path = f"{folder}{entry.name}"
                if seen > limit or path.count("/") > depth:
                    listing.too_many = True
                    return listing
                _sort_entry(entry, path, listing, pending)
        if count == 0 and folder:
            listing.empty.append(folder)
    return listing


def _sort_entry(entry: os.DirEntry[str], path: str, listing: Listing, pending: list[str]) -> None:
    if entry.is_symlink():
        listing.links.append(path)
    elif entry.is_dir(follow_symlinks=False):
        pending.append(f"{path}/")
    elif entry.is_file(follow_symlinks=False):
        listing.files[path] = entry.stat(follow_symlinks=False).st_size
    else:
        listing.special.append(path)


@contextmanager
def _open_folder(root: int, folder: str) -> Iterator[int]:
    descriptor = os.dup(root)
    try:
        for component in folder.split("/")[:-1]:
            inner = os.open(component, _DIRECTORY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def hash_descriptor(descriptor: int, *, on_chunk: Callable[[int], None] | None = None) -> tuple[int, str]:
    """Return the number of bytes and the SHA-256 of an open file, read from its start."""
    digest = hashlib.sha256()
    size = os.fstat(descriptor).st_size
    buffer = memoryview(bytearray(min(_HASH_BYTES, max(size, 1))))
    total = 0
    while count := os.preadv(descriptor, [buffer], total):
        digest.update(buffer[:count])
        total += count
        if on_chunk:
            on_chunk(count)
    return total, digest.hexdigest()


def hash_file(path: Path, *, on_chunk: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file. Raises OSError."""
    with path.open("rb") as stream:
        return hash_descriptor(stream.fileno(), on_chunk=on_chunk)[1]


def write_all(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write every byte at `offset`; one write call may take only a part. Raises OSError."""
    rest = memoryview(data).cast("B")
    while rest:
        count = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[count:], offset + count


def sync_directory(path: Path) -> None:
    """Make a directory's entries durable. Raises OSError."""
    with open_directory(path) as descriptor:
        os.fsync(descriptor)

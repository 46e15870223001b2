"""File system steps shared by reading and writing: opening without links, listing, hashing."""

from __future__ import annotations

import errno
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
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO would otherwise wait for a writer that never comes.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


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
        """Return the identity of a file from its status."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass
class Listing:
    """All entries below a directory, sorted into what may be there and what may not.

    Attributes:
        files: Regular files and their sizes.
        linked: Files with a second name, which may lie outside of the directory.
    """

    files: dict[str, int] = field(default_factory=dict)
    linked: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    too_many: bool = False


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """Close a descriptor at the end."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_directory(path: Path) -> int:
    """Open a directory; the last component may be a link, as the user's own name for it. Raises OSError."""
    return os.open(path, _DIRECTORY)


def open_file(path: Path | str) -> int:
    """Open a regular file, also behind links. Raises OSError."""
    return _only_regular(os.open(path, _FILE), str(path))


def open_beneath(root: int, path: str) -> int:
    """Open a regular file under `root`; no component may be a link. Raises OSError."""
    folder, _, name = path.rpartition("/")
    with closing(open_folder(root, folder)) as directory:
        return _only_regular(os.open(name, _FILE | os.O_NOFOLLOW, dir_fd=directory), path)


def _only_regular(descriptor: int, path: str) -> int:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return descriptor


def open_folder(root: int, folder: str) -> int:
    """Open a folder under `root`; no component may be a link. Raises OSError."""
    descriptor = os.dup(root)
    for component in filter(None, folder.split("/")):
        with closing(descriptor):
            descriptor = os.open(component, _DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
    return descriptor


def read_at_most(descriptor: int, limit: int) -> bytes:
    """Read up to one byte more than `limit`, so that a longer file shows without being read."""
    parts: list[bytes] = []
    total = 0
    while part := os.pread(descriptor, min(limit + 1 - total, 2**24), total):
        parts.append(part)
        total += len(part)
    return b"".join(parts)


def read_file(path: Path, limit: int) -> bytes:
    """Read a regular file. Raises OSError, and ValueError when it has more than `limit` bytes."""
    with closing(open_file(path)) as descriptor:
        data = read_at_most(descriptor, limit)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return data


def list_tree(root: int, *, limit: int, depth: int) -> Listing:
    """List everything below `root` without following links, giving up past `limit` entries or `depth` folders."""
    listing = Listing()
    pending = [""]
    seen = 0
    while pending:
        folder = pending.pop()
        before = seen
        with closing(open_folder(root, folder)) as descriptor, os.scandir(descriptor) as entries:
            for entry in entries:
                seen += 1
                path = f"{folder}{entry.name}"
                if seen > limit or path.count("/") > depth:
                    listing.too_many = True
                    return listing
                if entry.is_symlink():
                    listing.links.append(path)
                elif entry.is_dir(follow_symlinks=False):
                    pending.append(f"{path}/")
                elif entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    listing.files[path] = status.st_size
                    if status.st_nlink > 1:
                        listing.linked.append(path)
                else:
                    listing.special.append(path)
        if seen == before and folder:
            listing.empty.append(folder)
    return listing


def hash_descriptor(descriptor: int, *, on_chunk: Callable[[int], None] | None = None) -> tuple[int, str]:
    """Return the size and the SHA-256 of an open file, read from its start.

    `on_chunk` is called with the bytes of each step.
    """
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
    with closing(open_file(path)) as descriptor:
        return hash_descriptor(descriptor, on_chunk=on_chunk)[1]


def write_all(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write every byte at `offset`; one write call may take only a part. Raises OSError."""
    rest = memoryview(data).cast("B")
    while rest:
        count = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[count:], offset + count


def sync_directory(path: Path) -> None:
    """Make a directory's entries durable. Raises OSError."""
    with closing(open_directory(path)) as descriptor:
        os.fsync(descriptor)

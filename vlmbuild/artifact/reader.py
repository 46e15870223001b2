"""Verifying an artifact against its manifest, and reading files from a verified one."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from vlmbuild.artifact.canonical import MAX_BYTES
from vlmbuild.artifact.comparison import REMEDY, ByteProgress, Comparison, reading_errors
from vlmbuild.artifact.files import (
    Identity,
    closing,
    hash_descriptor,
    open_beneath,
    open_directory,
    open_file,
    open_folder,
    read_at_most,
)
from vlmbuild.artifact.hub import cached_blob
from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.paths import MANIFEST_NAME
from vlmbuild.errors import IncompatibleError, IntegrityError, UsageError, VlmbuildError
from vlmbuild.util.pool import cancellable_pool
from vlmbuild.util.text import listed
from vlmbuild.util.validation import reachable

Result = TypeVar("Result")

_MAX_READ_BYTES = 2**28
_ATTEMPTS = 5
"""Attempts to read an artifact that others overwrite."""


def verify(
    path: Path | str,
    *,
    expected_id: str | None = None,
    allow_hardlinks: bool = False,
    progress: ByteProgress | None = None,
) -> Manifest:
    """Check every file of an artifact, and that there is no other.

    Signatures and attestations (`model.sig`, `*.intoto.jsonl`) may lie beside its files, and so may what the hub adds:
    `README.md`, `.gitattributes`, the records of `hf download --local-dir`. A snapshot in the hub's download cache, which
    consists of links to the cache's files, is verified as if it were those files.

    Args:
        path: The artifact's directory.
        expected_id: The id that it must have.
        allow_hardlinks: Accept files with a second name, through which others may write to them.
        progress: Called as files are read, one call at a time, possibly from other threads.

    Returns:
        The manifest.

    Raises:
        IntegrityError: Files are missing, extra, changed or not plain files, all of which are named, or it is another
            artifact than the expected one.
        IncompatibleError: Its manifest belongs to another major version.
    """
    check_id(expected_id)

    def compare(reader: ArtifactReader) -> Manifest:
        # Each file is closed once it is hashed: there may be more files than a process may have open.
        reader._compare().check_contents(reader._open, progress)
        return reader.manifest

    return read_again_if_replaced(path, compare, expected_id=expected_id, allow_hardlinks=allow_hardlinks)


def read_again_if_replaced(path: Path | str, read: Callable[[ArtifactReader], Result], **options: Any) -> Result:
    """Call `read` with a reader of an artifact, and again when it fails because another directory took its place."""
    for attempts_left in reversed(range(_ATTEMPTS)):
        reader = None
        try:
            reader = ArtifactReader(path, verify=False, **options)
            return read(reader)
        except VlmbuildError:
            if not attempts_left or (reader is not None and not reader.is_replaced()):
                raise
    raise AssertionError  # the last attempt returns or raises


def check_id(expected_id: str | None) -> None:
    """Raise UsageError for something that is no artifact's id."""
    if expected_id is not None and not re.fullmatch(r"sha256:[0-9a-f]{64}", expected_id):
        raise UsageError(
            f"The expected id {expected_id!r} is not `sha256:` and 64 hexadecimal digits. Copy the id that "
            "`vlmbuild inspect` prints."
        )


class ArtifactReader:
    """An artifact whose files are read only as the manifest describes them.

    The directory and each file are opened once, so that what is hashed is what is read.

    The constructor raises the errors of `verify`. With `verify=False` only the manifest is checked at once, and each
    file when it is read.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        verify: bool = True,
        expected_id: str | None = None,
        allow_hardlinks: bool = False,
    ) -> None:
        self.path = reachable(path, IntegrityError, "The artifact")
        self._allow_hardlinks = allow_hardlinks
        self._descriptors: dict[str, int] = {}
        self._identities: dict[str, Identity] = {}
        self._by_name = False
        self._lock = threading.Lock()
        self._resources = ExitStack()
        weakref.finalize(self, self._resources.close)
        self._root = self._resources.enter_context(closing(_open_artifact(self.path)))
        self.manifest = self._read_manifest(expected_id)
        self._entries = {entry.path: entry for entry in self.manifest.files}
        if verify:
            with self.verifying(first=True):
                pass

    def _read_manifest(self, expected_id: str | None) -> Manifest:
        with reading_errors(self.path, MANIFEST_NAME):
            try:
                descriptor = self._open(MANIFEST_NAME)
            except FileNotFoundError as error:
                raise IntegrityError(
                    f"{self.path} is not an artifact: it has no {MANIFEST_NAME}. Give the folder that `vlmbuild build` "
                    "wrote; if it was copied, copy it again."
                ) from error
            with closing(descriptor):
                data = read_at_most(descriptor, MAX_BYTES)
        actual_id = "sha256:" + hashlib.sha256(data).hexdigest()
        if expected_id is not None and actual_id != expected_id:
            raise IntegrityError(
                f"{self.path} is another artifact: expected {expected_id}, found {actual_id}. Get the artifact that is "
                "expected, or correct the expected id if you meant this one."
            )
        return Manifest.from_bytes(data)

    def files(self, role: str) -> tuple[str, ...]:
        """Return the paths of one role, sorted."""
        return tuple(entry.path for entry in self.manifest.files if entry.role == role)

    def open(self, name: str) -> int:
        """Open a file of the manifest as a descriptor, which the caller closes.

        Raises FileNotFoundError for a name that the manifest does not list, IntegrityError when the file cannot be opened.
        """
        with self._lock:
            if name not in self._descriptors:
                if name not in self._entries:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
                with reading_errors(self.path, name):
                    descriptor = self._open(name)
                self._descriptors[name] = self._resources.enter_context(closing(descriptor))
                self._identities[name] = Identity.of(os.fstat(self._descriptors[name]))
            return os.dup(self._descriptors[name])

    def folder(self, name: str) -> str:
        """Return a path of a folder in the directory that was opened, whatever its own path leads to by now.

        Only Linux has such paths; elsewhere, and where files are links into a hub's cache, it is the folder's own path.
        """
        with reading_errors(self.path, name):
            descriptor = self._resources.enter_context(closing(open_folder(self._root, name)))
        pinned = f"/proc/self/fd/{descriptor}"
        with os.scandir(descriptor) as entries:
            linked = any(entry.is_symlink() for entry in entries)
        return str(self.path / name) if linked or not Path(pinned).is_dir() else pinned

    def _open(self, name: str, root: int | None = None) -> int:
        try:
            return open_beneath(self._root if root is None else root, name)
        except OSError as error:
            blob = cached_blob(self.path.resolve(), name) if error.errno == errno.ELOOP else None
            if blob is None:
                raise
            return open_file(blob)

    def read(self, name: str) -> bytes:
        """Read one file, checked against the manifest.

        Raises IncompatibleError when the artifact has no such file, IntegrityError when it differs from the manifest.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise IncompatibleError(
                f"The artifact {self.path} (target {self.manifest.target}) has no file {name!r}. "
                "Build it for the target that is asked for."
            )
        if entry.size > _MAX_READ_BYTES:
            raise IncompatibleError(
                f"{self.path / name} has {entry.size} bytes; the limit of a file that is read whole is {_MAX_READ_BYTES}. "
                "Check that it is the file that the build wrote, and get the artifact again."
            )
        with reading_errors(self.path, name), closing(self.open(name)) as descriptor:
            data = read_at_most(descriptor, entry.size)
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.digest:
            raise IntegrityError(f"{self.path / name} is not what {MANIFEST_NAME} says. {REMEDY}")
        return data

    def is_replaced(self) -> bool:
        """Return whether the path leads to another directory by now."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._root))
        except OSError:
            return True

    def _compare(self) -> Comparison:
        return Comparison(self.path, self._root, self.manifest, self._open, allow_hardlinks=self._allow_hardlinks)

    @contextmanager
    def copied(self, *roles: str) -> Iterator[Path]:
        """Copy the files of some roles to a private directory, for code of others that reads them by name."""
        with ExitStack() as stack:
            try:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vlmbuild-")))
                for name in (name for role in roles for name in self.files(role)):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(self.read(name))
            except OSError:  # nowhere to write: read by name, and `verifying` sees whether it still is the same file
                folder, self._by_name = self.path, True
            yield folder

    @contextmanager
    def verifying(self, *, first: bool = False, progress: ByteProgress | None = None) -> Iterator[None]:
        """Verify all files, and that none changes while the block runs.

        With `first` they are verified before the block, which may then read them by name. Otherwise other threads verify
        them while it runs: nothing that it reads is proven before its end. `progress` is called by the former alone.

        Raises the errors of `verify`, also in place of an error of the block: the data may have been wrong.
        """
        comparison = self._compare()
        for entry in comparison.intact:
            with reading_errors(self.path, entry.path):
                os.close(self.open(entry.path))
        if first or comparison.problems:
            comparison.check_contents(self.open, progress)
            yield
            self.check_unchanged(by_name=True)
            return
        with cancellable_pool(1) as (pool, check):
            verification = pool.submit(comparison.check_contents, self.open, lambda _done, _total: check())
            try:
                yield
            except Exception:
                verification.result()
                raise
            verification.result()
        self.check_unchanged(by_name=self._by_name)

    def check_unchanged(self, *, by_name: bool = False) -> None:
        """Raise IntegrityError when a file was written to since it was opened, or with `by_name` also when it was replaced."""
        changed = []
        for name, descriptor in sorted(self._descriptors.items()):
            identity = self._identities[name]
            if by_name:
                same = self._has_name(name, identity)
            else:  # Losing its name changes the status of a file as writing to it does.
                same = Identity.of(os.fstat(descriptor)) == identity or self._is_intact(name, descriptor)
            if not same:
                changed.append(name)
        if changed:
            raise IntegrityError(
                f"{self.path} changed while it was loaded: {listed(changed)}. Do not write to an artifact in use; "
                "load it again."
            )

    def _is_intact(self, name: str, descriptor: int) -> bool:
        with reading_errors(self.path, name):
            return hash_descriptor(descriptor)[1] == self._entries[name].digest

    def _has_name(self, name: str, identity: Identity) -> bool:
        try:
            with closing(open_directory(self.path)) as root, closing(self._open(name, root)) as descriptor:
                return Identity.of(os.fstat(descriptor)) == identity
        except OSError:
            return False


def _open_artifact(path: Path) -> int:
    try:
        return open_directory(path)
    except FileNotFoundError as error:
        raise IntegrityError(
            f"There is no artifact at {path}. Give the folder of an artifact; get one from a hub with `hf download NAME "
            "--local-dir DIR`."
        ) from error
    except NotADirectoryError as error:
        raise IntegrityError(
            f"{path} is not a folder, so it is not an artifact. Give the folder that holds {MANIFEST_NAME}."
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise IntegrityError(f"{path} cannot be opened: {error}. Give the folder of an artifact.") from error

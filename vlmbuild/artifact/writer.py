"""Writing an artifact: a private staging directory, hashed files, one rename at the end."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vlmbuild.artifact.files import CHUNK_BYTES, closing, hash_descriptor, open_file, sync_directory, write_all
from vlmbuild.artifact.manifest import FileEntry, Manifest
from vlmbuild.artifact.output import FULL_DISK, cannot_write, check_output, check_space, output_errors
from vlmbuild.artifact.paths import MANIFEST_NAME, SUMS_NAME, check_collisions, check_path
from vlmbuild.artifact.reader import verify
from vlmbuild.artifact.staging import create_staging, publish_exchange, publish_new, remove_abandoned
from vlmbuild.errors import IncompatibleError, IntegrityError, OutputError, SourceError
from vlmbuild.util.interrupt import check_interrupted


class ArtifactWriter:
    """A context in which an artifact is written; nothing is visible at `output` before `publish`.

    Entering raises OutputError when the output may not be written. Leaving without `publish`, by whatever exception,
    removes the staging directory and leaves the output as it was. A full disk anywhere inside is an OutputError.
    """

    def __init__(self, output: Path | str, *, overwrite: bool = False) -> None:
        # abspath, not resolve: a link at the output has to be seen as a link.
        self.output = Path(os.path.abspath(output))
        self._overwrite = overwrite
        self._staging: Path | None = None
        self._entries: dict[str, FileEntry | None] = {}

    def __enter__(self) -> Self:
        check_output(self.output, overwrite=self._overwrite)
        with output_errors(self.output):
            remove_abandoned(self.output)
            self._staging = create_staging(self.output)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise cannot_write(self.output, error) from error

    @property
    def staging(self) -> Path:
        """The directory that becomes the artifact. Raises OutputError outside the context."""
        if self._staging is None:
            raise OutputError(f"The writer of {self.output} is not open. Use it inside `with ArtifactWriter(...)`.")
        return self._staging

    def require_space(self, needed: int) -> None:
        """Raise OutputError when the disk has fewer than `needed` bytes free."""
        check_space(self.output, self.staging, needed)

    def open(self, path: str, role: str) -> OutputFile:
        """Open a new file, which belongs to the artifact once it is closed.

        Raises IntegrityError for a path or role that is not allowed, OutputError when it cannot be created.
        """
        check_path(path)
        check_collisions([*self._entries, path])
        FileEntry(path, 0, "0" * 64, role)  # refuse a wrong role now, not after gigabytes are written
        where = self.staging / path
        with output_errors(self.output / path):
            where.parent.mkdir(parents=True, exist_ok=True)
            file = OutputFile(
                where,
                self.output / path,
                lambda size, digest: self._entries.update({path: FileEntry(path, size, digest, role)}),
            )
        self._entries[path] = None
        return file

    def write(self, path: str, data: bytes, role: str) -> None:
        """Write one file. Raises the errors of `open`."""
        with self.open(path, role) as file:
            file.write(data)

    def copy(self, source: Path | str, path: str, role: str) -> None:
        """Copy one file in chunks. Raises SourceError when it cannot be read, and the errors of `open`."""
        try:
            descriptor = open_file(source)
        except OSError as error:
            raise _unreadable(source, error) from error
        with closing(descriptor), self.open(path, role) as file:
            while chunk := _read_source(descriptor, source):
                file.write(chunk)

    def publish(self, *, name: str, target: str, **details: Any) -> Manifest:
        """Write the manifest, verify what lies on the disk, and make it the output in one rename.

        Args:
            name: Name of the artifact.
            target: What it was built for.
            **details: Further fields of `Manifest`.

        Raises:
            OutputError: The output appeared or changed during the build, or cannot be written.
            IntegrityError: The disk holds something else than was written.
        """
        open_files = [path for path, entry in self._entries.items() if entry is None]
        if open_files:
            raise OutputError(f"Files of {self.output} are still open: {', '.join(open_files)}. Close them first.")
        files = tuple(entry for _, entry in sorted(self._entries.items()) if entry is not None)
        manifest = Manifest(name, target, files, **details)
        staging = self.staging
        with output_errors(self.output):
            for path, data in ((SUMS_NAME, manifest.sums()), (MANIFEST_NAME, manifest.to_bytes())):
                with OutputFile(staging / path, self.output / path) as file:
                    file.write(data)
            _settle(staging)
            self._verify_written(staging, manifest)
            self._rename(staging, manifest)
        try:
            sync_directory(self.output.parent)
        except OSError as error:
            raise OutputError(
                f"{self.output} is complete, but the disk did not confirm its name ({error.strerror}), so it may be "
                "gone after a power loss. Check the disk, then verify the artifact."
            ) from error
        # Only now that the new name is durable is a replaced output removed, which lies at the staging path.
        return manifest

    def _verify_written(self, staging: Path, manifest: Manifest) -> None:
        try:
            verify(staging, expected_id=manifest.id)
        except IntegrityError as error:
            raise IntegrityError(
                f"The disk returned something else than was written to {self.output}; nothing was published. "
                f"Check the disk, then build again. {error}"
            ) from error

    def _rename(self, staging: Path, manifest: Manifest) -> None:
        check_interrupted()  # whoever sent a signal expects no artifact
        if self._overwrite and os.path.lexists(self.output):
            check_output(self.output, overwrite=True)  # again: hours may have passed
            publish_exchange(staging, self.output)
            return
        try:
            publish_new(staging, self.output)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            # Two builds of the same thing: whoever comes second has nothing left to do.
            if not _holds(self.output, manifest.id):
                raise OutputError(
                    f"{self.output} appeared while this artifact was built. Look at what is there; to replace an "
                    "artifact, build again with --overwrite."
                ) from error


class OutputFile:
    """One file being written. Its digest is taken on the way, or by reading back where bytes came out of order."""

    def __init__(self, path: Path, where: Path, on_close: Callable[[int, str], None] | None = None) -> None:
        """
        Args:
            path: The file to create.
            where: Its path in messages.
            on_close: Called with its size and SHA-256.
        """
        self._where, self._on_close = where, on_close
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor: int | None = os.open(path, flags, 0o600)
        self._end = 0
        self._in_order = hashlib.sha256()
        self._scattered = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append. Raises OutputError."""
        self.write_at(data, self._end)

    def write_at(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write at any place, also beyond the end. Raises OutputError."""
        if self._descriptor is None:
            raise OutputError(f"{self._where} is closed. Write before closing it.")
        view = memoryview(data).cast("B")
        with output_errors(self._where):
            write_all(self._descriptor, view, offset)
        if offset == self._end:
            self._in_order.update(view)
        else:
            self._scattered = True
        self._end = max(self._end, offset + len(view))

    def close(self) -> None:
        """Make the file durable and part of the artifact. Raises OutputError."""
        if self._descriptor is None:
            return
        with output_errors(self._where):
            # Before fsync, so that these are the bytes in memory; `publish` reads them again from the disk.
            digest = hash_descriptor(self._descriptor)[1] if self._scattered else self._in_order.hexdigest()
            os.fchmod(self._descriptor, 0o644)  # whatever the umask is
            os.fsync(self._descriptor)
            # The next read comes from the disk, not from memory.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self.abandon()
        if self._on_close:
            self._on_close(self._end, digest)

    def abandon(self) -> None:
        """Close without making the file part of the artifact."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _read_source(descriptor: int, source: Path | str) -> bytes:
    try:
        return os.read(descriptor, CHUNK_BYTES)
    except OSError as error:
        raise _unreadable(source, error) from error


def _unreadable(source: Path | str, error: OSError) -> SourceError:
    return SourceError(f"{source} cannot be read: {error.strerror}. Check the path, the disk and permissions.")


def _holds(output: Path, expected_id: str) -> bool:
    try:
        verify(output, expected_id=expected_id)
    except (IntegrityError, IncompatibleError):
        return False
    return True


def _settle(staging: Path) -> None:
    """Make every folder durable, with a mode that does not depend on the umask, the deepest first."""
    for folder, _, _ in os.walk(staging, topdown=False):
        os.chmod(folder, 0o755)
        sync_directory(Path(folder))

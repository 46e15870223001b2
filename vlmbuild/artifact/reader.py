"""Verifying an artifact against its manifest, and reading files from a verified one."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vlmbuild.artifact.canonical import MAX_BYTES, MAX_DEPTH
from vlmbuild.artifact.files import Identity, hash_descriptor, list_tree, open_beneath, open_directory
from vlmbuild.artifact.manifest import MANIFEST_NAME, MAX_FILES, SUMS_NAME, FileEntry, Manifest
from vlmbuild.errors import IncompatibleError, IntegrityError, VlmbuildError
from vlmbuild.util.pool import cancellable_pool
from vlmbuild.util.validation import reachable

ByteProgress = Callable[[int, int], None]
"""Called with the bytes done and their total."""

_NAMES_SHOWN = 1000
_REMEDY = "Copy or download the artifact again, or build it again."


def verify(path: Path | str, *, expected_id: str | None = None, progress: ByteProgress | None = None) -> Manifest:
    """Check every file of an artifact, and that there is no other, and return its manifest.

    `progress(done_bytes, total_bytes)` is called as files are read, one call at a time, possibly from other threads.
    Raises IntegrityError naming every file that is missing, extra, changed or not a plain file, or when the artifact
    is not the expected one; IncompatibleError when its manifest belongs to another major version.
    """
    return _verify(reachable(path, IntegrityError, "The artifact"), expected_id, progress)[0]


class ArtifactReader:
    """An artifact whose files are read only as the manifest describes them.

    The constructor raises the errors of `verify`. With `verify=False` only the manifest is checked at once, and each
    file when it is read.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        verify: bool = True,
        expected_id: str | None = None,
        progress: ByteProgress | None = None,
    ) -> None:
        self.path = reachable(path, IntegrityError, "The artifact")
        self._identities: dict[str, Identity] = {}
        if verify:
            self.manifest, self._identities = _verify(self.path, expected_id, progress)
        else:
            with _artifact_directory(self.path) as root:
                self.manifest = _read_manifest(self.path, root, expected_id)

    def files(self, role: str) -> tuple[str, ...]:
        """Return the paths of one role, sorted."""
        return tuple(entry.path for entry in self.manifest.files if entry.role == role)

    def read(self, name: str) -> bytes:
        """Read one file, checked against the manifest.

        Raises IncompatibleError when the artifact has no such file, IntegrityError when it differs from the manifest.
        """
        entry = self.manifest.entry(name)
        if entry is None:
            raise IncompatibleError(
                f"The artifact {self.path} (target {self.manifest.target}) has no file {name!r}. "
                "Build it for the target that is asked for."
            )
        try:
            with _artifact_directory(self.path) as root, open_beneath(root, name) as descriptor:
                data = _read_at_most(descriptor, entry.size)
        except OSError as error:
            raise _unreadable(self.path, name, error) from error
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.digest:
            raise IntegrityError(f"{self.path / name} is not what {MANIFEST_NAME} says. {_REMEDY}")
        return data

    @contextmanager
    def verifying(self, *, first: bool = False) -> Iterator[None]:
        """Verify all files, and that none changes while the block runs.

        With `first` they are verified before the block. Otherwise other threads verify them while it runs: nothing that it
        reads is proven before its end.

        Raises the errors of `verify`, also in place of an error of the block: the data may have been wrong.
        """
        if first:
            _, self._identities = _verify(self.path, self.manifest.id, None)
            yield
            self.check_unchanged()
            return
        with cancellable_pool(1) as (pool, check):
            verification = pool.submit(_verify, self.path, self.manifest.id, lambda _done, _total: check())
            try:
                yield
            except VlmbuildError:
                verification.result()
                raise
            _, self._identities = verification.result()
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Raise IntegrityError when a file was replaced or written to since it was verified.

        For files that others read by name, such as weights: call it when they have been read.
        """
        changed = []
        with _artifact_directory(self.path) as root:
            for name, identity in sorted(self._identities.items()):
                try:
                    with open_beneath(root, name) as descriptor:
                        same = Identity.of(os.fstat(descriptor)) == identity
                except OSError:
                    same = False
                if not same:
                    changed.append(name)
        if changed:
            raise IntegrityError(
                f"{self.path} changed while it was loaded: {_names(changed)}. Do not write to an artifact in use; "
                "load it again."
            )


@dataclass
class _Problems:
    """Files that fail verification, by kind of failure."""

    kinds: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, names: Iterable[str]) -> None:
        if found := sorted(names):
            self.kinds.setdefault(kind, []).extend(found)

    def raise_any(self, path: Path) -> None:
        if self.kinds:
            found = "; ".join(f"{kind}: {_names(names)}" for kind, names in self.kinds.items())
            raise IntegrityError(f"{path} is not what its {MANIFEST_NAME} says. {found}. {_REMEDY}")


def _names(names: list[str]) -> str:
    # repr: a name on disk is not checked yet, and may hold control characters.
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:_NAMES_SHOWN])
    return shown + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")


@contextmanager
def _artifact_directory(path: Path) -> Iterator[int]:
    """Open an artifact's directory; a wrong path raises IntegrityError."""
    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context(open_directory(path))
        except FileNotFoundError as error:
            raise IntegrityError(f"There is no artifact at {path}. Give the folder of an artifact.") from error
        except NotADirectoryError as error:
            raise IntegrityError(
                f"{path} is not a folder, so it is not an artifact. Give the folder that holds {MANIFEST_NAME}."
            ) from error
        except OSError as error:
            raise _unreadable(path, ".", error) from error
        yield descriptor


def _verify(path: Path, expected_id: str | None, progress: ByteProgress | None) -> tuple[Manifest, dict[str, Identity]]:
    with _artifact_directory(path) as root:
        manifest = _read_manifest(path, root, expected_id)
        problems = _Problems()
        try:
            intact = _compare_listing(root, manifest, problems)
            identities = _compare_contents(root, intact, problems, progress)
        except OSError as error:
            raise _unreadable(path, error.filename or ".", error) from error
        problems.raise_any(path)
    return manifest, identities


def _read_manifest(path: Path, root: int, expected_id: str | None) -> Manifest:
    try:
        with open_beneath(root, MANIFEST_NAME) as descriptor:
            data = _read_at_most(descriptor, MAX_BYTES)
    except FileNotFoundError as error:
        raise IntegrityError(
            f"{path} is not an artifact: it has no {MANIFEST_NAME}. Give the folder that `vlmbuild build` wrote; if it "
            "was copied, copy it again."
        ) from error
    except OSError as error:
        raise _unreadable(path, MANIFEST_NAME, error) from error
    actual_id = "sha256:" + hashlib.sha256(data).hexdigest()
    if expected_id is not None and actual_id != expected_id:
        raise IntegrityError(
            f"{path} is another artifact: expected {expected_id}, found {actual_id}. Get the artifact that is "
            "expected, or correct the expected id if you meant this one."
        )
    return Manifest.from_bytes(data)


def _read_at_most(descriptor: int, limit: int) -> bytes:
    """Read up to one byte more than `limit`, so that a longer file shows without being read."""
    parts: list[bytes] = []
    total = 0
    while part := os.pread(descriptor, min(limit + 1 - total, 2**24), total):
        parts.append(part)
        total += len(part)
    return b"".join(parts)


def _compare_listing(root: int, manifest: Manifest, problems: _Problems) -> list[FileEntry]:
    listing = list_tree(root, limit=2 * MAX_FILES, depth=MAX_DEPTH)
    if listing.too_many:
        problems.add("too many or too deeply nested files", ["."])
        return []
    expected = {entry.path: entry.size for entry in manifest.files}
    sums = manifest.sums()
    expected[SUMS_NAME] = len(sums)
    expected[MANIFEST_NAME] = len(manifest.to_bytes())
    found = listing.files
    problems.add("links", listing.links)
    problems.add("not plain files", listing.special)
    problems.add("empty folders", listing.empty)
    problems.add("missing", expected.keys() - found - set(listing.links) - set(listing.special))
    problems.add("not listed in the manifest", found.keys() - expected)
    wrong = {name for name in expected.keys() & found if expected[name] != found[name]}
    problems.add("truncated", (_sizes(name, found, expected) for name in wrong if found[name] < expected[name]))
    problems.add("too long", (_sizes(name, found, expected) for name in wrong if found[name] > expected[name]))
    if SUMS_NAME in found and SUMS_NAME not in wrong:
        with open_beneath(root, SUMS_NAME) as descriptor:
            if _read_at_most(descriptor, len(sums)) != sums:
                problems.add("changed", [SUMS_NAME])
    return [entry for entry in manifest.files if entry.path in found and entry.path not in wrong]


def _sizes(name: str, found: dict[str, int], expected: dict[str, int]) -> str:
    return f"{name} ({found[name]} bytes of {expected[name]})"


def _compare_contents(
    root: int, entries: list[FileEntry], problems: _Problems, progress: ByteProgress | None
) -> dict[str, Identity]:
    total, done, lock = sum(entry.size for entry in entries), 0, threading.Lock()
    identities: dict[str, Identity] = {}
    digests: dict[str, str] = {}
    with cancellable_pool(min(8, os.cpu_count() or 1)) as (pool, check):

        def on_chunk(count: int) -> None:
            nonlocal done
            check()
            if progress is not None:
                with lock:
                    done += count
                    progress(done, total)

        def hash_entry(entry: FileEntry) -> None:
            with open_beneath(root, entry.path) as descriptor:
                identities[entry.path] = Identity.of(os.fstat(descriptor))
                digests[entry.path] = hash_descriptor(descriptor, on_chunk=on_chunk)[1]

        # The largest first, so that no thread starts it when the others are done.
        for _ in pool.map(hash_entry, sorted(entries, key=lambda entry: -entry.size)):
            pass
    owner = {entry.digest: entry.path for entry in entries}
    for entry in entries:
        if digests[entry.path] != entry.digest:
            other = owner.get(digests[entry.path])
            problems.add("changed", [f"{entry.path} (holds the content of {other})" if other else entry.path])
    return identities


def _unreadable(path: Path, name: str, error: OSError) -> IntegrityError:
    # ELOOP is how the system says that a component is a link.
    reason = "it is a link" if error.errno == errno.ELOOP else error.strerror or str(error)
    return IntegrityError(f"{path / name} cannot be read: {reason}. Check the disk and permissions. {_REMEDY}")

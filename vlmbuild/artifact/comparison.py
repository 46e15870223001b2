"""Comparing an artifact's files with its manifest: names and sizes first, before anything is read, then contents."""

from __future__ import annotations

import errno
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlmbuild.artifact.canonical import MAX_BYTES, MAX_DEPTH
from vlmbuild.artifact.files import closing, hash_descriptor, list_tree, open_file, read_at_most, read_file
from vlmbuild.artifact.hub import cached_blob, is_extra
from vlmbuild.artifact.manifest import MAX_FILES, FileEntry, Manifest
from vlmbuild.artifact.paths import MANIFEST_NAME, SUMS_NAME
from vlmbuild.errors import IntegrityError
from vlmbuild.util.pool import cancellable_pool
from vlmbuild.util.text import listed

ByteProgress = Callable[[int, int], None]
"""Called with the bytes done and their total."""

REMEDY = "Copy or download the artifact again, or build it again."
_NAMES_SHOWN = 1000
_REMEDIES = {
    "links": "Copy what links lead to, as `cp -rL` does.",
    "hard links": "Copy it, or pass allow_hardlinks=True (to `verify`: --allow-hardlinks) if you trust its other names.",
    "not listed in the manifest": "Move files that are not part of the artifact elsewhere.",
}
"""Kind of problem -> advice that helps where another copy would not."""


class Comparison:
    """Result of comparing names and sizes, and then contents.

    Attributes:
        intact: Files that have the right size.
        problems: Kind of problem -> names.
    """

    def __init__(
        self, path: Path, root: int, manifest: Manifest, open_name: Callable[[str], int], *, allow_hardlinks: bool
    ) -> None:
        """
        Args:
            path: The artifact.
            root: Its directory, open.
            manifest: Its manifest.
            open_name: Opens a file by name.
            allow_hardlinks: Accept files with a second name.
        """
        self.path = path
        self.problems: dict[str, list[str]] = defaultdict(list)
        with reading_errors(path, "."):
            found = list_tree(root, limit=2 * MAX_FILES, depth=MAX_DEPTH)
        if found.too_many:
            raise IntegrityError(f"{path} holds too many or too deeply nested files. {REMEDY}")
        sums = manifest.sums()
        expected = {entry.path: entry.size for entry in manifest.files}
        expected |= {SUMS_NAME: len(sums), MANIFEST_NAME: len(manifest.to_bytes())}
        sizes = found.files | self._cached_sizes(found.links)
        links = [name for name in found.links if name not in sizes]
        wrong = {name: size for name, size in expected.items() if sizes.get(name, size) != size}
        shown = {name: f"{name} ({sizes[name]} bytes of {size})" for name, size in wrong.items()}
        extra = (name for name in sizes.keys() - expected if not is_extra(name, expected))
        self.intact = [entry for entry in manifest.files if entry.path in sizes and entry.path not in wrong]
        self._add("links", links)
        self._add("hard links", [] if allow_hardlinks else expected.keys() & found.linked)
        self._add("not plain files", found.special)
        self._add("empty folders", found.empty)
        self._add("missing", expected.keys() - sizes - set(links) - set(found.special))
        self._add("not listed in the manifest", extra)
        self._add("truncated", (shown[name] for name, size in wrong.items() if sizes[name] < size))
        self._add("too long", (shown[name] for name, size in wrong.items() if sizes[name] > size))
        if SUMS_NAME in sizes and SUMS_NAME not in wrong:
            with reading_errors(path, SUMS_NAME), closing(open_name(SUMS_NAME)) as descriptor:
                if read_at_most(descriptor, len(sums)) != sums:
                    self._add("changed", [SUMS_NAME])

    def _add(self, kind: str, names: Iterable[str]) -> None:
        if found := sorted(names):
            self.problems[kind] += found

    def _cached_sizes(self, links: Iterable[str]) -> dict[str, int]:
        """Return the sizes of linked files in the hub's cache."""
        sizes = {}
        for name in links:
            if blob := cached_blob(self.path.resolve(), name):
                with suppress(OSError), closing(open_file(blob)) as descriptor:
                    sizes[name] = os.fstat(descriptor).st_size
        return sizes

    def check_contents(self, open_name: Callable[[str], int], progress: ByteProgress | None = None) -> None:
        """Hash the files that have the right size. Raises IntegrityError that names all problems."""
        total, done, lock = sum(entry.size for entry in self.intact), 0, threading.Lock()
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
                with reading_errors(self.path, entry.path), closing(open_name(entry.path)) as descriptor:
                    digests[entry.path] = hash_descriptor(descriptor, on_chunk=on_chunk)[1]

            # The largest first, so that no thread starts it when the others are done.
            for _ in pool.map(hash_entry, sorted(self.intact, key=lambda entry: -entry.size)):
                pass
        owner = {entry.digest: entry.path for entry in self.intact}
        for entry in self.intact:
            if digests[entry.path] != entry.digest:
                other = owner.get(digests[entry.path])
                self._add("changed", [f"{entry.path} (holds the content of {other})" if other else entry.path])
        if self.problems:
            found = "; ".join(f"{kind}: {listed(names, _NAMES_SHOWN)}" for kind, names in self.problems.items())
            remedies = [remedy for kind, remedy in _REMEDIES.items() if kind in self.problems]
            remedies += [REMEDY] if self.problems.keys() - _REMEDIES else []
            raise IntegrityError(f"{self.path} is not what its {MANIFEST_NAME} says. {found}. {' '.join(remedies)}")


@contextmanager
def reading_errors(path: Path, name: str) -> Iterator[None]:
    """Turn an OSError into an IntegrityError about a file of an artifact."""
    try:
        yield
    except OSError as error:
        # ELOOP is how the system says that a component is a link.
        reason = "it is a link" if error.errno == errno.ELOOP else error.strerror or str(error)
        advice = "Raise the limit with `ulimit -n`." if error.errno == errno.EMFILE else f"Check the disk. {REMEDY}"
        raise IntegrityError(f"{path / name} cannot be read: {reason}. {advice}") from error


def is_artifact(directory: Path) -> bool:
    """Return whether a directory has the manifest of an artifact, of any version. Raises IntegrityError."""
    with reading_errors(directory, MANIFEST_NAME):
        try:
            return b'"vlmbuild.artifact/' in read_file(directory / MANIFEST_NAME, MAX_BYTES)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EINVAL):  # missing, or no file
                return False
            raise
        except ValueError:  # larger than any manifest
            return False

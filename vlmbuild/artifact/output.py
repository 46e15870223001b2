"""Where an artifact may be written, and the errors of a place that cannot take it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmbuild.artifact.canonical import MAX_BYTES
from vlmbuild.artifact.files import read_file
from vlmbuild.artifact.paths import MANIFEST_NAME, SUMS_NAME
from vlmbuild.artifact.staging import restore_replaced
from vlmbuild.errors import OutputError
from vlmbuild.util.text import listed
from vlmbuild.util.validation import reachable

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(output: str | Path, *, overwrite: bool) -> None:
    """Raise OutputError when an artifact may not be written to `output`, with what to do instead."""
    output = Path(os.path.abspath(reachable(output, OutputError, "The output")))
    parent = output.parent
    if not output.name:
        raise OutputError(f"{output} cannot be an output. Give the path of a folder to create.")
    if not parent.exists():
        raise OutputError(
            f"The folder {parent} does not exist, so {output.name} cannot be made in it. Create it first."
        )
    if not parent.is_dir():
        raise OutputError(f"{parent} is not a folder, so {output.name} cannot be made in it. Choose another output.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"The folder {parent} is not writable. Change its permissions or choose another output.")
    with output_errors(parent):
        restore_replaced(output)
    if output.is_symlink():
        raise OutputError(f"The output {output} is a link. Give the path that it points to, or remove it.")
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise OutputError(f"The output {output} is a file. Choose another output, or remove it.")
    if not overwrite:
        raise OutputError(f"The output {output} exists. Choose another output, or replace it with --overwrite.")
    _check_replaceable(output)


def check_file(output: Path) -> None:
    """Raise OutputError when the file `output` cannot be written. Makes its folder, and leaves the file as it is."""
    with output_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        new = not output.exists()
        output.open("ab").close()
        if new:
            output.unlink()


def _check_replaceable(output: Path) -> None:
    """Raise OutputError unless a folder is empty or holds an artifact and nothing of the user's."""
    found: set[str] = set()
    for folder, folders, names in os.walk(output):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        found.update(Path(folder, name).relative_to(output).as_posix() for name in names + links)
    if not found and not any(output.iterdir()):
        return
    own = _listed_files(output)
    if own is None:
        raise OutputError(
            f"The output {output} exists and is not a vlmbuild artifact, so --overwrite does not replace it. "
            "Choose another output, or remove the folder yourself."
        )
    if foreign := sorted(found - own - {MANIFEST_NAME, SUMS_NAME}):
        raise OutputError(
            f"The output {output} is an artifact that also holds files which are not part of it: {listed(foreign)}. "
            "Move them elsewhere, then use --overwrite."
        )


def _listed_files(output: Path) -> set[str] | None:
    """Return the files that a manifest of any schema version lists, or None when there is no such manifest."""
    try:
        value = json.loads(read_file(output / MANIFEST_NAME, MAX_BYTES))
        if not value["schema"].startswith("vlmbuild.artifact/"):
            return None
        return {str(entry["path"]) for entry in value["files"]}
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL):  # missing, or no file
            return None
        raise cannot_write(output / MANIFEST_NAME, error) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def check_space(output: Path, folder: Path, needed: int) -> None:
    """Raise OutputError when the disk of `folder` has fewer than `needed` bytes free for `output`."""
    with output_errors(output):
        available = shutil.disk_usage(folder).free
    if needed > available:
        raise OutputError(
            f"Not enough space for {output}: {needed} bytes ({human_size(needed)}) are needed and {available} "
            f"({human_size(available)}) are free. Free {human_size(needed - available)}, or choose an output on "
            "another disk."
        )


@contextmanager
def output_errors(where: Path) -> Iterator[None]:
    """Turn an OSError of the file system into an OutputError about `where`."""
    try:
        yield
    except OSError as error:
        raise cannot_write(where, error) from error


def cannot_write(where: Path, error: OSError) -> OutputError:
    """Return the error of an output that cannot be written; it names the file below `where`, if the system does."""
    inner = os.fsdecode(error.filename or "").partition(".staging-")[2].partition("/")[2]
    where = where if str(where).endswith(inner) else where / inner
    advice = "Check the disk and permissions, or choose another output."
    if error.errno in FULL_DISK:
        advice = "Free space, raise the quota or file size limit, or choose an output on another disk."
    return OutputError(f"{where} cannot be written: {error.strerror or error}. Nothing was left there. {advice}")


def human_size(count: int) -> str:
    """Format a number of bytes."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"

"""Artifacts as model hubs and signing tools hand them over: links into a download cache, and files beside the artifact's."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

from vlmbuild.errors import IntegrityError, SourceError, UsageError
from vlmbuild.util.progress import Progress, silent
from vlmbuild.util.validation import reachable

HUB_ID: Final = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
"""Name of a repository on the hub, and after "@" a branch, tag or commit."""

_RECORDS = ".cache/huggingface/"
_EXTRA_NAMES = frozenset(
    {
        "model.sig",  # OpenSSF model signing
        "README.md",
        ".gitattributes",
        *(f"{_RECORDS}{name}" for name in ("CACHEDIR.TAG", ".gitignore", ".gitignore.lock")),
    }
)
_EXTRA_PATTERN = re.compile(r"[^/]+\.intoto\.jsonl")
_RECORD_PATTERN = re.compile(re.escape(_RECORDS) + r"(?:download|upload)/(.+)\.(?:metadata|lock)")


def is_card_or_signature(name: str) -> bool:
    """Return whether a file beside the manifest is about the artifact: its model card, a signature or an attestation."""
    return name in ("README.md", "model.sig") or _EXTRA_PATTERN.fullmatch(name) is not None


def is_extra(path: str, listed: Collection[str]) -> bool:
    """Return whether a file may be in an artifact without being listed, since no loader opens it.

    These are signatures and attestations, the hub's own two files of a repository, and the records that `hf download
    --local-dir` keeps of each file.
    """
    if path in _EXTRA_NAMES or _EXTRA_PATTERN.fullmatch(path):
        return True
    record = _RECORD_PATTERN.fullmatch(path)
    return record is not None and (record[1] in listed or record[1] in _EXTRA_NAMES)


def cached_blob(directory: Path, name: str) -> Path | None:
    """Return the file that a link in a snapshot of the hub's download cache leads to; None for every other link.

    A snapshot is `models--OWNER--NAME/snapshots/REVISION`. Its links lead to `blobs` of the same repository, or from there
    to the cache's common `blobs`. The file's content is still to be verified.

    Args:
        directory: The snapshot, without links in its path.
        name: Path of the link in it.
    """
    if directory.parent.name != "snapshots":
        return None
    repository = directory.parent.parent
    blob = Path(os.path.realpath(directory / name))
    own = blob.parent == repository / "blobs"
    common = blob.parent.parent == repository.parent / "blobs" and re.fullmatch(r"[0-9a-f]{2}", blob.parent.name)
    return blob if own or common else None


def artifact_directory(path: Path | str, revision: str | None = None, progress: Progress = silent) -> Path:
    """Return the directory of an artifact. A hub id is downloaded into the hub's cache, unless it is there already.

    Args:
        path: A directory, which need not exist, or a hub id ("owner/name" or "owner/name@revision").
        revision: Branch, tag or commit of a hub id without its own.
        progress: Called when a download begins and ends.

    Raises:
        IntegrityError: The system cannot look the path up.
        SourceError: A hub id cannot be downloaded.
        UsageError: `revision` is given, and the path is not a hub id.
    """
    directory = reachable(path, IntegrityError, "The artifact")
    if is_hub_id(path):
        progress("download", 0, 1)
        directory = download(str(path), revision)
        progress("download", 1, 1)
    else:
        check_no_revision(path, revision)
    return directory


def is_hub_id(path: Path | str) -> bool:
    """Return whether a path is a hub id, and no local file or directory has that path."""
    return HUB_ID.fullmatch(str(path)) is not None and not Path(path).exists()


def split_revision(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Split "owner/name@revision" into both; a name that is no hub id is returned as it is.

    Raises:
        UsageError: Another revision is given beside it.
    """
    match = HUB_ID.fullmatch(name)
    if match is None or match[2] is None:
        return name, revision
    if revision not in (None, match[2]):
        raise UsageError(f"{name} names a revision, and so does {revision!r}. Drop one of them.")
    return match[1], match[2]


def check_no_revision(path: Path | str, revision: str | None) -> None:
    """Raise UsageError if there is a revision. The caller knows that the path is not a hub id."""
    if revision is not None:
        raise UsageError(f"{path} is not a hub id, so it has no revision {revision!r}. Drop the revision.")


def download(name: str, revision: str | None, patterns: list[str] | None = None) -> Path:
    """Download files of a repository into the hub's cache, or find them there. Raises SourceError.

    Args:
        name: A hub id.
        revision: Branch, tag or commit of a hub id without its own.
        patterns: Names of the files; None is all of them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, revision = split_revision(name, revision)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"{name} is neither a directory here nor in the local cache, and the hub cannot be reached. Check the "
            "network (or HF_HUB_OFFLINE), or download it elsewhere and give its directory."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise SourceError(
            f"{name}{f' at revision {revision}' if revision else ''} is no directory here, and cannot be "
            f"downloaded: {error}. Check the path, or the name and the revision; for a gated model, log in with "
            "`hf auth login`."
        ) from error

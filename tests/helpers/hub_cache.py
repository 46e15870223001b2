"""Artifacts in a download cache as huggingface_hub lays it out."""

from __future__ import annotations

import os
import shutil

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(artifact, cache, *, absolute=False, shared=()):
    """Make a snapshot of owner/name, the branch `main`; blobs of `shared` files lie in the store of all repositories."""
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(path for path in artifact.rglob("*") if path.is_file())):
        name = file.relative_to(artifact).as_posix()
        blob, link = repository / "blobs" / f"{number:064x}", snapshot / name
        if name in shared:
            common = cache / "blobs" / "ab" / f"{number:064x}"
            common.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, common)
            blob.symlink_to(os.path.relpath(common, blob.parent))
        else:
            shutil.copy(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob if absolute else os.path.relpath(blob, link.parent))
    return snapshot

"""Artifacts that verify, and hold something else than a build would write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.reader import verify
from vlmbuild.artifact.writer import ArtifactWriter


def republish(
    artifact: Path, target: Path, changes: Mapping[str, bytes], *, overwrite: bool = False, **details: Any
) -> Path:
    """Publish an artifact again with the content of some files replaced, or some files more (role "data").

    Args:
        artifact: The artifact.
        target: Where the other one goes.
        changes: Path -> content.
        overwrite: Replace what is there.
        **details: Fields of the manifest that differ.
    """
    manifest = verify(artifact)
    roles = {entry.path: entry.role for entry in manifest.files}
    with ArtifactWriter(target, overwrite=overwrite) as writer:
        for name in sorted(roles | changes):
            data = changes[name] if name in changes else (artifact / name).read_bytes()
            writer.write(name, data, roles.get(name, "data"))
        same = {field.name: getattr(manifest, field.name) for field in fields(Manifest) if field.name != "files"}
        writer.publish(**same | details)
    return target

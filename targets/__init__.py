"""What a build writes, by the recipe's `target`."""

from __future__ import annotations

from collections.abc import Callable

from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.targets import trainable
from vlmbuild.targets.request import Request

TARGETS: dict[str, Callable[[ArtifactWriter, Request], Manifest]] = {"trainable": trainable.write}

__all__ = ["TARGETS", "Request"]

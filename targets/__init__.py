"""What a build writes, by the recipe's `target`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.targets import aoti, onnx, trainable
from vlmbuild.targets.request import Request

Write = Callable[[ArtifactWriter, Request], Manifest]

WRITING: dict[str, Callable[[], AbstractContextManager[Write]]] = {
    "trainable": lambda: nullcontext(trainable.write),
    "onnx": lambda: nullcontext(onnx.write),
    "aoti": aoti.writing,
}
"""Entered when a build begins; what it gives writes and publishes the artifact."""

__all__ = ["WRITING", "Request"]

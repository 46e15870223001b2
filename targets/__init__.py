"""What a build writes, by the recipe's `target`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

from vlmbuild.targets import aoti, onnx, trainable
from vlmbuild.targets.request import Request, StoredParameter

from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.families import Family
from vlmbuild.program import Program
from vlmbuild.recipe import Recipe

Write = Callable[[ArtifactWriter, Request], Manifest]

WRITING: dict[str, Callable[[], AbstractContextManager[Write]]] = {
    "trainable": lambda: nullcontext(trainable.write),
    "onnx": lambda: nullcontext(onnx.write),
    "aoti": aoti.writing,
}
"""Entered when a build begins; what it gives writes and publishes the artifact."""

STORED: dict[str, Callable[[Program, Family, Recipe], Iterator[StoredParameter]]] = {
    "trainable": trainable.stored_parameters,
    "onnx": onnx.stored_parameters,
    "aoti": aoti.stored_parameters,
}
"""Says what will be stored, before any weight is read."""

__all__ = ["STORED", "WRITING", "Request", "StoredParameter"]

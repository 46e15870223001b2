"""What a build writes, by the recipe's `target`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vlmbuild.targets import aoti, onnx, trainable
from vlmbuild.targets.request import Request, StoredParameter

from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.families import Family
from vlmbuild.program import Program
from vlmbuild.recipe import Recipe

WRITERS: dict[str, Callable[[ArtifactWriter, Request], Manifest]] = {
    "trainable": trainable.write,
    "onnx": onnx.write,
    "aoti": aoti.write,
}
"""Writes and publishes the artifact."""

STORED: dict[str, Callable[[Program, Family, Recipe], Iterator[StoredParameter]]] = {
    "trainable": trainable.stored_parameters,
    "onnx": onnx.stored_parameters,
    "aoti": aoti.stored_parameters,
}
"""Says what will be stored, before any weight is read."""

__all__ = ["STORED", "WRITERS", "Request", "StoredParameter"]

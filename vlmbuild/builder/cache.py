"""Builds that are made once and loaded from then on, in a cache that several processes may use at the same time."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from vlmbuild.artifact.output import output_errors
from vlmbuild.artifact.reader import verify
from vlmbuild.builder.build import build
from vlmbuild.checkpoint.source import Source, resolve
from vlmbuild.errors import ArtifactError, UsageError
from vlmbuild.recipe import BUILD_TOOLS, Recipe
from vlmbuild.runtime.hf import Model
from vlmbuild.runtime.load import OPENERS, load
from vlmbuild.runtime.torch.model import VisionLanguageModel


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    processor: str | Path | None = None,
    expected_id: str | None = None,
    **recipe: Any,
) -> tuple[Model, Any]:
    """Build on first use into a cache, load from then on. Safe when several processes start at once.

    A build is found again by the source's commit or path, the name, size and time of change of each of its files, the
    recipe, and the versions of vlmbuild, torch, transformers and bitsandbytes. A source that is touched is built again.

    Args:
        source: Source of `build`.
        revision: Revision of a hub id.
        cache_dir: Where builds are kept; $VLMBUILD_CACHE or ~/.cache/vlmbuild by default.
        device: Device of `vlmbuild.load`.
        processor: Source of the processor's files, as for `build`.
        expected_id: The id that the artifact must have; `model.artifact_id` is the one that it has.
        **recipe: Fields of `Recipe`, for example quantize="nf4".

    Raises:
        UsageError: The target's artifacts hold code.
        IntegrityError: The artifact has another id than expected.
        VlmbuildError: As `build` and `load`.
    """
    chosen = Recipe.from_mapping(recipe, where="from_pretrained")
    if OPENERS[chosen.target].runs_code:
        raise UsageError(
            "from_pretrained: code belongs to one kind of machine, and is loaded with trust. Use build with that "
            'target, then load(path, trust=("code",)).'
        )
    sources = [resolve(source, revision=revision)]
    if processor is not None:
        sources.append(resolve(processor, weights=False))
    cache = Path(cache_dir or os.environ.get("VLMBUILD_CACHE") or Path.home() / ".cache" / "vlmbuild")
    path = cache / _cache_key(sources, chosen)
    with output_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire()
    try:
        artifact_id = _sound_id(path)
        if artifact_id is None:
            shutil.rmtree(path, ignore_errors=True)  # ours, whatever became of it; nothing of the user's is here
            artifact_id = build(source, path, chosen, revision=revision, processor=processor).manifest.id
    finally:
        lock.release()
    model, processor = load(path, device=device, verify=False, expected_id=expected_id or artifact_id)
    if isinstance(model, VisionLanguageModel):
        model.source = str(source)
    return model, processor


def _cache_key(sources: Iterable[Source], recipe: Recipe) -> str:
    """Hash the sources' files (name, size, time), the recipe, and the versions that decide the artifact."""
    parts = []
    for source in sources:
        parts.append(source.uri if "@" in source.uri else str(source.directory.resolve()))
        stats = [(file.name, file.stat()) for file in sorted(source.directory.iterdir()) if file.is_file()]
        parts += [f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in stats]
    parts += [recipe.fingerprint(), *(importlib.metadata.version(tool) for tool in BUILD_TOOLS)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _sound_id(path: Path) -> str | None:
    """Return the id of an artifact, or None where there is none that verifies."""
    try:
        return verify(path).id
    except ArtifactError:
        return None

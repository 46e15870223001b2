"""Locks of lock files, artifacts and checkpoints. Reading a lock file does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vlmbuild.artifact.paths import MANIFEST_NAME
from vlmbuild.checkpoint.source import Source, resolve
from vlmbuild.errors import UsageError
from vlmbuild.locks.difference import Difference, compare
from vlmbuild.locks.document import SUFFIX, Lock, read_lock
from vlmbuild.recipe import Recipe
from vlmbuild.util.progress import Progress

if TYPE_CHECKING:
    from vlmbuild.builder.tracing import Traced


def lock(
    source: str | Path | Source,
    recipe: Recipe = Recipe(),
    *,
    revision: str | None = None,
    kernels: bool = True,
    progress: Progress | None = None,
) -> Lock:
    """Lock a model under a recipe. Only config.json is read.

    Args:
        source: Source of `vlmbuild.build`.
        recipe: Recipe of the build.
        revision: Branch, tag or commit of a hub id.
        kernels: False leaves out the table of Triton kernels.
        progress: Called with a stage's name, the amount done, and the total.

    Raises:
        UsageError: The recipe has a budget, or a pattern that matches nothing.
        SourceError: The source cannot be used.
        CaptureError, PassError: The graph cannot be built.
    """
    traced = trace_source(source, revision=revision, progress=progress)

    from vlmbuild.locks.make import lock_traced

    return lock_traced(traced, recipe, kernels=kernels)


def trace_source(
    source: str | Path | Source, *, revision: str | None = None, progress: Progress | None = None
) -> Traced:
    """Capture the model of a source."""
    found = resolve(source, revision=revision, weights=False, progress=progress)

    from vlmbuild.builder.tracing import trace
    from vlmbuild.checkpoint.checkpoint import Checkpoint

    return trace(Checkpoint.open(found, weights=False).values, found.uri, progress)


def diff(
    old: str | Path,
    new: str | Path,
    recipe: Recipe | Callable[[Recipe], Recipe] | None = None,
    *,
    kernels: bool = True,
) -> Difference:
    """Compare two locks, artifacts or checkpoints, in any combination.

    Args:
        old, new: A lock file, an artifact, or a source as for `vlmbuild.build`.
        recipe: Recipe of checkpoints, or a function that derives it from the recipe of the other side. None takes the
            other side's recipe, which compares an artifact with a new build.
        kernels: False leaves kernels out.

    Raises:
        UsageError: Both sides have their own recipe, and `recipe` is set.
        VlmbuildError: A lock or an artifact cannot be read, or a checkpoint cannot be traced.
    """
    sides = [_read(side, kernels) for side in (old, new)]
    if recipe is not None and None not in sides:
        raise UsageError(
            "Locks and artifacts have their own recipe. Drop the recipe options, or compare with a checkpoint."
        )
    known = next((side.recipe for side in sides if side is not None), Recipe())
    chosen = known if recipe is None else recipe if isinstance(recipe, Recipe) else recipe(known)
    locks = [
        side if side is not None else lock(source, chosen, kernels=kernels)
        for side, source in zip(sides, (old, new), strict=True)
    ]
    return compare(locks[0], locks[1])


def _read(side: str | Path, kernels: bool) -> Lock | None:
    """Return the lock of a file or an artifact; None for a checkpoint, which needs a recipe."""
    path = Path(side)
    if path.is_file() or path.suffix == SUFFIX:
        return read_lock(path)
    if not (path / MANIFEST_NAME).is_file():
        return None

    from vlmbuild.locks.make import lock_artifact

    return lock_artifact(path, kernels=kernels)

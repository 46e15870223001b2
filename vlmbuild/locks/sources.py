"""Locks of lock files, artifacts and checkpoints. Reading a lock file does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vlmbuild.artifact.comparison import is_artifact
from vlmbuild.artifact.hub import check_no_revision, download, is_hub_id
from vlmbuild.artifact.paths import MANIFEST_NAME
from vlmbuild.checkpoint.source import Source, resolve
from vlmbuild.errors import UsageError
from vlmbuild.ir.schema import PROGRAM_FILE
from vlmbuild.locks.difference import Difference, compare
from vlmbuild.locks.document import SUFFIX, Lock, read_lock
from vlmbuild.recipe import Recipe
from vlmbuild.util.progress import Progress

_READ_FILES = (MANIFEST_NAME, "config.json", PROGRAM_FILE)
"""Files that the lock of an artifact is made of."""

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
    revisions: tuple[str | None, str | None] = (None, None),
    kernels: bool = True,
) -> Difference:
    """Compare two locks, artifacts or checkpoints, in any combination.

    Args:
        old, new: A lock file, an artifact or its hub id, or a source as for `vlmbuild.build`.
        recipe: Recipe of checkpoints, or a function that derives it from the recipe of the other side. None takes the
            other side's recipe, which compares an artifact with a new build.
        revisions: Branch, tag or commit of either side that is a hub id.
        kernels: False leaves kernels out.

    Raises:
        UsageError: Both sides have their own recipe, and `recipe` is set.
        VlmbuildError: A lock or an artifact cannot be read, or a checkpoint cannot be traced.
    """
    sides = [_read(side, revision, kernels) for side, revision in zip((old, new), revisions, strict=True)]
    if recipe is not None and None not in sides:
        raise UsageError(
            "Locks and artifacts have their own recipe. Drop the recipe options, or compare with a checkpoint."
        )
    known = next((side.recipe for side in sides if side is not None), Recipe())
    chosen = known if recipe is None else recipe if isinstance(recipe, Recipe) else recipe(known)
    locks = [
        side if side is not None else lock(source, chosen, revision=revision, kernels=kernels)
        for side, source, revision in zip(sides, (old, new), revisions, strict=True)
    ]
    return compare(locks[0], locks[1])


def _read(side: str | Path, revision: str | None, kernels: bool) -> Lock | None:
    """Return the lock of a file or an artifact; None for a checkpoint, which needs a recipe."""
    path = Path(side)
    if path.is_file() or path.suffix == SUFFIX:
        check_no_revision(side, revision)
        return read_lock(path)
    if is_hub_id(side):
        path = download(str(side), revision, [MANIFEST_NAME])
        path = download(str(side), revision, [*_READ_FILES]) if is_artifact(path) else path
    if not is_artifact(path):
        return None
    if not is_hub_id(side):
        check_no_revision(side, revision)

    from vlmbuild.locks.make import lock_artifact

    return lock_artifact(path, kernels=kernels)

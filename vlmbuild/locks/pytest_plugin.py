"""The pytest plugin: a fixture that compares a model's graph with a committed lock, and `--update-locks` to write it.

    def test_graph(graph_lock):
        graph_lock("my-model-nf4", vlmbuild.Recipe(quantize=vlmbuild.QuantSpec()), source="my-checkpoint")

The lock is `locks/my-model-nf4.lock` beside the test. Once it exists it needs no source: it contains the model's config.
torch is imported only by tests that use the fixture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vlmbuild.recipe import Recipe

GraphLock = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--update-locks`."""
    group = parser.getgroup("vlmbuild")
    group.addoption("--update-locks", action="store_true", help="Rewrite the graph locks of vlmbuild.")


@pytest.fixture
def graph_lock(request: pytest.FixtureRequest) -> GraphLock:
    """Return a function of a lock's name and a recipe; it fails the test if the graph differs from the lock.

    Options: `source` (as for `vlmbuild.build`) is needed only to create a lock; `folder` is "locks", beside the test;
    `kernels=False` leaves kernels out.
    """
    update = bool(request.config.getoption("--update-locks"))
    beside = Path(str(request.path)).parent

    def compare_with_lock(
        name: str, recipe: Recipe, source: str | Path | None = None, *, folder: str = "locks", kernels: bool = True
    ) -> None:
        __tracebackhide__ = True
        path = beside / folder / f"{name}.lock"
        if failure := _failure(path, recipe, source, update=update, kernels=kernels):
            pytest.fail(failure, pytrace=False)

    return compare_with_lock


def _failure(path: Path, recipe: Recipe, source: str | Path | None, *, update: bool, kernels: bool) -> str:
    """Compare with the lock, or write it if `update`; return the reason for a failure, or ""."""
    import click

    from vlmbuild.builder.tracing import trace
    from vlmbuild.errors import UsageError
    from vlmbuild.locks.check import keep_kernels
    from vlmbuild.locks.difference import compare
    from vlmbuild.locks.document import read_lock, write_lock
    from vlmbuild.locks.make import lock_traced
    from vlmbuild.locks.render import text
    from vlmbuild.locks.sources import trace_source

    if not path.exists() and not update:
        return f"{path} does not exist. Run pytest with --update-locks to write it, review it, and commit it."
    try:
        old = read_lock(path) if path.exists() else None
    except UsageError as error:
        return str(error)
    if update or old is None:
        if source is None and old is None:
            return f"{path} does not exist. Pass source=... to create it."
        traced = trace_source(source) if source is not None else trace(old.config, old.source)  # type: ignore[union-attr]
        write_lock(path, keep_kernels(lock_traced(traced, recipe, kernels=kernels), old))
        return ""
    difference = compare(old, lock_traced(trace(old.config, old.source), recipe, kernels=kernels))
    for note in difference.notes:
        warnings.warn(f"{path.name}: {note}", stacklevel=2)
    if not difference.findings:
        return ""
    return (
        click.unstyle("\n".join(text(path.stem, difference)))
        + "\nIf this is intended, run pytest with --update-locks and commit the result."
    )

"""The pytest plugin: a fixture that holds a model's graph against a committed lock, and `--update-locks` to write it.

    def test_graph(graph_lock):
        graph_lock("my-model-nf4", vlmbuild.Recipe(quantize=vlmbuild.QuantSpec()), source="my-checkpoint")

The lock is `locks/my-model-nf4.lock` beside the test. Once it is there it needs no source: it carries the model's config.
Nothing of torch is imported before a test asks for the fixture.
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
    """`--update-locks`."""
    group = parser.getgroup("vlmbuild")
    group.addoption("--update-locks", action="store_true", help="Write the graph locks of vlmbuild anew.")


@pytest.fixture
def graph_lock(request: pytest.FixtureRequest) -> GraphLock:
    """Call it with a lock's name and a recipe; the test fails with the differences in words.

    Options: `source` (as for `vlmbuild.build`) is needed to make a lock, and read by nothing else; `folder`, beside the test,
    is "locks"; `kernels=False` leaves kernels out.
    """
    update = bool(request.config.getoption("--update-locks"))
    beside = Path(str(request.path)).parent

    def hold(
        name: str, recipe: Recipe, source: str | Path | None = None, *, folder: str = "locks", kernels: bool = True
    ) -> None:
        __tracebackhide__ = True
        path = beside / folder / f"{name}.lock"
        if failure := _held(path, recipe, source, update=update, kernels=kernels):
            pytest.fail(failure, pytrace=False)

    return hold


def _held(path: Path, recipe: Recipe, source: str | Path | None, *, update: bool, kernels: bool) -> str:
    """What is wrong, or ""; writes the lock if it is to be updated."""
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
        return f"{path} does not exist. Run pytest with --update-locks to write it, look at it, and commit it."
    try:
        old = read_lock(path) if path.exists() else None
    except UsageError as error:
        return str(error)
    if update or old is None:
        if source is None and old is None:
            return f"{path} does not exist, and no source is given to make it from. Pass source=..."
        traced = trace_source(source) if source is not None else trace(old.config, old.source)  # type: ignore[union-attr]
        write_lock(path, keep_kernels(lock_traced(traced, recipe, kernels=kernels), old))
        return ""
    difference = compare(old, lock_traced(trace(old.config, old.source), recipe, kernels=kernels))
    for note in difference.notes:
        warnings.warn(f"{path.name}: {note}", stacklevel=2)
    if not difference.findings:
        return ""
    return click.unstyle("\n".join(text(path.stem, difference))) + "\nIf it is meant: pytest --update-locks."

"""The command `vlmbuild check`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlmbuild.artifact.output import check_file, output_errors
from vlmbuild.cli.options import fail_option, format_option, json_option, kernels_option
from vlmbuild.cli.output import StageProgress, print_json
from vlmbuild.errors import GraphDiffersError, UnreadableLockError
from vlmbuild.locks.difference import Severity
from vlmbuild.locks.document import lock_files
from vlmbuild.util.text import listed, terminal_width

if TYPE_CHECKING:
    from vlmbuild.locks.check import Checked
    from vlmbuild.measure.pass_parity import Parity


@click.command()
@click.argument("locks", nargs=-1, required=True, type=click.Path(path_type=Path))
@format_option
@kernels_option
@fail_option
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE.xml", help="Also write a JUnit report for CI.")
@click.option(
    "--update", is_flag=True, help="Rewrite locks that differ or that other versions made; differences no longer fail."
)
@click.option(
    "--bisect", is_flag=True, help="Also run each model forward and backward, and name the pass that breaks it."
)
@click.option("--processes", type=click.IntRange(min=1), help="Parallel processes.  [default: one per core]")
@json_option
def command(
    locks: tuple[Path, ...],
    style: str,
    kernels: bool,
    limit: Severity,
    junit: Path | None,
    update: bool,
    bisect: bool,
    processes: int | None,
    as_json: bool,
) -> None:
    """Compare locks with the graphs that this version compiles.

    LOCKS are lock files or folders of them. Exits with 6 if a graph, a pass or a kernel differs, and explains each
    difference. Exits with 2 if a lock cannot be read and nothing differs. If a lock was made with another version of
    torch, transformers or triton, only parts that these versions do not change are compared, and a note says so.

    \b
    Examples:
        vlmbuild check artifacts/locks/
        vlmbuild check artifacts/locks/ --format markdown --junit check.xml
        vlmbuild check my-model.lock --bisect
    """
    files = lock_files(locks)
    if junit is not None:  # before minutes of work are lost
        check_file(junit)
    with StageProgress(lines=False) as progress:
        from vlmbuild.locks import render
        from vlmbuild.locks.check import check, lock_parities

        results = check(files, kernels=kernels, processes=processes, progress=progress)
    parities = lock_parities(files) if bisect else {}
    if junit is not None:
        with output_errors(junit):
            junit.write_text(render.junit(results, limit), encoding="utf-8")
    if as_json:
        parity = {"parity": {str(path): parity.to_json() for path, parity in parities.items()}} if bisect else {}
        print_json({**render.check_document(results, limit), **parity})
    else:
        lines = render.check_lines(results, style, limit, terminal_width(render.WIDTH))
        click.echo("\n".join([*_parity_lines(parities), *lines]))
    if update:
        _update(results)
        results = tuple(result for result in results if result.error)
    _fail(results, limit, parities)


def _parity_lines(parities: Mapping[Path, Parity]) -> Iterator[str]:
    from vlmbuild.measure.pass_parity import parity_lines

    for path, parity in parities.items():
        yield from parity_lines(str(path), parity)


def _update(results: Iterable[Checked]) -> None:
    """Rewrite locks, including those of other versions: only locks of these versions are compared whole."""
    from vlmbuild.locks.document import write_lock

    for result in results:
        if result.now is not None and (result.difference.findings or result.difference.notes):
            write_lock(result.path, result.now)
            click.echo(f"{result.path}: updated", err=True)


def _fail(results: Sequence[Checked], limit: Severity, parities: Mapping[Path, Parity]) -> None:
    """Raise GraphDiffersError for a lock that differs or a pass that changes values, else UnreadableLockError."""
    different = [result.path for result in results if result.fails(limit) and not result.error]
    unread = [result.path for result in results if result.unreadable]
    unmade = [result.path for result in results if result.error and not result.unreadable]
    if different:
        raise GraphDiffersError(
            f"{_count(different)} differ{'s' * (len(different) == 1)} from the code: {_names(different)}. "
            "If this is intended, run with --update and commit the result."
        )
    if unmade:
        raise GraphDiffersError(
            f"{_count(unmade)} cannot be compared: {_names(unmade)}. Create them again with `vlmbuild lock`."
        )
    for path, parity in parities.items():
        if path in unread:
            continue
        if parity.refused:
            raise GraphDiffersError(f"{path}: parity could not be computed: {parity.refused}")
        if parity.broken_by:
            raise GraphDiffersError(
                f"{path}: the pass {parity.broken_by} changes values although it is declared exact. Fix the pass; the "
                "table shows the errors."
            )
    if unread:
        raise UnreadableLockError(
            f"{_count(unread)} cannot be read: {_names(unread)}. Create them again with `vlmbuild lock`."
        )


def _count(paths: Sequence[Path]) -> str:
    return f"{len(paths)} lock{'s' * (len(paths) > 1)}"


def _names(paths: Sequence[Path]) -> str:
    return listed([path.stem for path in paths], 5)

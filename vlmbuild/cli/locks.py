"""Commands about graphs under regression: lock, check, diff. Nothing here imports torch by itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlmbuild.artifact.output import output_errors
from vlmbuild.cli.options import RecipeOptions, json_option, recipe_option_values, recipe_options
from vlmbuild.cli.output import StageProgress
from vlmbuild.errors import GraphDiffersError
from vlmbuild.locks.difference import SEVERITIES, Severity
from vlmbuild.recipe import Recipe

if TYPE_CHECKING:
    from vlmbuild.locks.check import Checked
    from vlmbuild.measure.pass_parity import Parity

format_option = click.option(
    "--format",
    "style",
    type=click.Choice(["text", "markdown"]),
    default="text",
    show_default=True,
    help="Of the report; markdown is for a pull-request comment.",
)
kernels_option = click.option(
    "--kernels/--no-kernels",
    default=True,
    show_default=True,
    help="Compile Triton kernels ahead of time, without a GPU.",
)
fail_option = click.option(
    "--fail-on",
    "limit",
    type=click.Choice(SEVERITIES),
    default="cosmetic",
    show_default=True,
    help="The least severe difference that exits with 6; cosmetic is any.",
)


@click.command()
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE.lock", help="To write.")
@recipe_options
@kernels_option
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@json_option
def lock(source: str, output: Path, recipe: Recipe, kernels: bool, revision: str | None, as_json: bool) -> None:
    """Write down what is compiled from a model.

    The lock is one text file: interface, graphs, matches of every pass, costs, and what Triton makes of the kernels. It
    carries the model's config, so checking it needs neither SOURCE nor weights. config.json of SOURCE is enough.

    \b
    Examples:
        vlmbuild lock Qwen/Qwen2-VL-2B-Instruct --quantize nf4 -o artifacts/locks/qwen2-vl-nf4.lock
        vlmbuild lock ./my-checkpoint --recipe recipe.toml -o my-model.lock
    """
    from vlmbuild.locks.document import write_lock
    from vlmbuild.locks.sources import lock as make

    with StageProgress(lines=not as_json) as progress:
        made = make(source, recipe, revision=revision, kernels=kernels, progress=progress)
    write_lock(output, made)
    summary = {
        "path": str(output),
        "regions": len(made.regions),
        "kernels": len(made.kernels.table),
        "kernels_skipped": made.kernels.skipped,
        "passes": {name: entry.matches for name, entry in made.passes.items()},
    }
    skipped = f" (no kernel table: {made.kernels.skipped})" if made.kernels.skipped else ""
    said = f"{output}: {len(made.regions)} regions, {len(made.kernels.table)} kernels{skipped}"
    click.echo(json.dumps(summary, indent=2) if as_json else said)


@click.command()
@click.argument("locks", nargs=-1, required=True, type=click.Path(path_type=Path))
@format_option
@kernels_option
@fail_option
@click.option(
    "--junit", type=click.Path(path_type=Path), metavar="FILE.xml", help="Also write a report for CI servers."
)
@click.option(
    "--update",
    is_flag=True,
    help="Write locks anew where they differ, or were made with other versions; differences are then no failure.",
)
@click.option(
    "--bisect", is_flag=True, help="Also run each model forward and backward, and name the pass that broke it."
)
@click.option("--processes", type=click.IntRange(min=1), help="How many at once.  [default: one a core]")
@json_option
def check(
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
    """Hold locks against the code.

    LOCKS are files or folders of them. Exits with 6, and says what changed and what that means, if a graph, a pass or a
    kernel is not as locked. Where torch, transformers or triton have other versions than those that a lock was made
    with, that is said, and only what they do not change by themselves is compared.

    \b
    Examples:
        vlmbuild check artifacts/locks/
        vlmbuild check artifacts/locks/ --format markdown --junit check.xml
        vlmbuild check artifacts/locks/qwen2-vl-digits-none-sdpa.lock --bisect
    """
    from vlmbuild.locks.check import check as run_check
    from vlmbuild.locks.parity import lock_parities
    from vlmbuild.locks.render import check_document, check_lines
    from vlmbuild.locks.render import junit as junit_text
    from vlmbuild.measure.pass_parity import parity_lines

    if junit is not None:  # before minutes of work are lost
        with output_errors(junit):
            junit.parent.mkdir(parents=True, exist_ok=True)
            junit.touch()
    with StageProgress(lines=False) as progress:
        results = run_check(locks, kernels=kernels, processes=processes, progress=progress)
    parities = lock_parities(locks) if bisect else {}
    if junit is not None:
        with output_errors(junit):
            junit.write_text(junit_text(results, limit), encoding="utf-8")
    if as_json:
        parity = {"parity": {str(path): found.to_json() for path, found in parities.items()}} if bisect else {}
        click.echo(json.dumps(check_document(results, limit) | parity, indent=2))
    else:
        tables = [line for path, found in parities.items() for line in parity_lines(str(path), found)]
        click.echo("\n".join([*tables, *check_lines(results, style)]))
    if update:
        _update(results)
        results = tuple(result for result in results if result.error)
    _fail([result for result in results if result.fails(limit)])
    _fail_parity(parities)


def _fail(failed: list[Checked]) -> None:
    if failed:
        names = ", ".join(result.path.stem for result in failed[:5]) + (" and others" if len(failed) > 5 else "")
        raise GraphDiffersError(
            f"{len(failed)} lock{'s' * (len(failed) > 1)} no longer hold{'s' * (len(failed) == 1)}: {names}. If the change "
            "is meant, write them anew with --update and commit them; the diff above is for the reviewer."
        )


def _update(results: Iterable[Checked]) -> None:
    """Also those that were made with other versions: only then can all of them be compared."""
    from vlmbuild.locks.document import write_lock

    for result in results:
        if result.now is not None and (result.difference.findings or result.difference.notes):
            write_lock(result.path, result.now)
            click.echo(f"{result.path}: written anew", err=True)


def _fail_parity(parities: Mapping[Path, Parity]) -> None:
    for path, parity in parities.items():
        if parity.refused:
            raise GraphDiffersError(f"{path}: parity was not computed; the table says why.")
        if parity.broken_by:
            raise GraphDiffersError(
                f"{path}: pass {parity.broken_by} changes values, and it promises not to. The table says how far."
            )


@click.command()
@click.argument("old")
@click.argument("new")
@recipe_option_values
@format_option
@kernels_option
@fail_option
@json_option
def diff(old: str, new: str, options: RecipeOptions, style: str, kernels: bool, limit: Severity, as_json: bool) -> None:
    """Say what differs between two compiled models.

    OLD and NEW are locks, artifacts or checkpoints, in any combination. A checkpoint is compiled by the other side's
    recipe, with what is given here in its place. Exits with 6 if they differ.

    \b
    Examples:
        vlmbuild diff old.lock new.lock
        vlmbuild diff qwen2-vl-nf4 Qwen/Qwen2-VL-2B-Instruct
        vlmbuild diff Qwen/Qwen2-VL-2B-Instruct Qwen/Qwen2-VL-7B-Instruct --quantize nf4 --format markdown
    """
    from vlmbuild.locks.render import document, markdown, text
    from vlmbuild.locks.sources import diff as compare_sources

    found = compare_sources(old, new, options.over if options.given() else None, kernels=kernels)
    show = markdown if style == "markdown" else text
    click.echo(json.dumps(document(found), indent=2) if as_json else "\n".join(show(f"{old} → {new}", found)))
    if found.worst is not None and SEVERITIES.index(found.worst) <= SEVERITIES.index(limit):
        count = f"{len(found.findings)} finding{'s' * (len(found.findings) > 1)}"
        raise GraphDiffersError(f"{old} and {new} differ: {count}, the worst: {found.worst}.")


COMMANDS: tuple[click.Command, ...] = (lock, check, diff)

"""The command `vlmbuild diff`."""

from __future__ import annotations

from typing import Any

import click

from vlmbuild.cli.options import (
    fail_option,
    format_option,
    json_option,
    kernels_option,
    recipe_change,
    recipe_options,
)
from vlmbuild.cli.output import StageProgress, print_json
from vlmbuild.errors import GraphDiffersError
from vlmbuild.locks import render
from vlmbuild.locks.difference import Severity
from vlmbuild.locks.sources import diff
from vlmbuild.util.text import terminal_width


@click.command()
@click.argument("old")
@click.argument("new")
@click.option("--old-revision", help="Branch, tag or commit of OLD, a hub id.")
@click.option("--new-revision", help="Branch, tag or commit of NEW, a hub id.")
@recipe_options
@format_option
@kernels_option
@fail_option
@json_option
def command(
    old: str,
    new: str,
    old_revision: str | None,
    new_revision: str | None,
    style: str,
    kernels: bool,
    limit: Severity,
    as_json: bool,
    **options: Any,
) -> None:
    """Explain the differences between two compiled models.

    OLD and NEW are locks, artifacts or checkpoints, in any combination; artifacts and checkpoints by
    folder or hub id. A checkpoint is compiled with the recipe of the other side; recipe options change that recipe.
    Exits with 6 if the models differ.

    \b
    Examples:
        vlmbuild diff old.lock new.lock
        vlmbuild diff qwen2-vl-nf4 Qwen/Qwen2-VL-2B-Instruct
        vlmbuild diff owner/model owner/model --old-revision v1 --new-revision v2
        vlmbuild diff ./my-checkpoint ./new-checkpoint --format markdown
    """
    change = recipe_change(options)
    with StageProgress(lines=False):
        difference = diff(old, new, change, revisions=(old_revision, new_revision), kernels=kernels)
    if as_json:
        print_json(render.document(difference))
    else:
        title, width = f"{old} → {new}", terminal_width(render.WIDTH)
        markdown = style == "markdown"
        lines = render.markdown(title, difference) if markdown else render.text(title, difference, width)
        click.echo("\n".join(lines))
    if difference.fails(limit):
        count = f"{len(difference.findings)} difference{'s' * (len(difference.findings) > 1)}"
        raise GraphDiffersError(f"{old} and {new} differ: {count}, the most severe: {difference.worst}.")

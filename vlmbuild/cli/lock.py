"""The command `vlmbuild lock`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vlmbuild.artifact.output import check_file
from vlmbuild.checkpoint.source import resolve
from vlmbuild.cli.options import json_option, kernels_option, recipe_from, recipe_options, revision_option
from vlmbuild.cli.output import StageProgress, print_json


@click.command()
@click.argument("source")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE.lock", help="Lock file to write."
)
@recipe_options
@kernels_option
@revision_option
@json_option
def command(source: str, output: Path, kernels: bool, revision: str | None, as_json: bool, **options: Any) -> None:
    """Record the compiled graph of a model in a text file.

    The lock lists the interface, the graphs, the matches of every pass, costs and Triton kernels. It contains the
    model's config, so `vlmbuild check` needs neither SOURCE nor weights. Only the config.json of SOURCE is read.

    \b
    Examples:
        vlmbuild lock Qwen/Qwen2-VL-2B-Instruct --quantize nf4 -o qwen2-vl.lock
        vlmbuild lock ./my-checkpoint --recipe recipe.toml -o my-model.lock
    """
    recipe = recipe_from(options)
    check_file(output)
    with StageProgress(lines=not as_json) as progress:
        found = resolve(source, revision=revision, weights=False, progress=progress)
        found.config()  # a malformed one is refused before torch is imported

        from vlmbuild.locks.document import write_lock
        from vlmbuild.locks.sources import lock

        locked = lock(found, recipe, kernels=kernels, progress=progress)
    write_lock(output, locked)
    if as_json:
        print_json(
            {
                "path": str(output),
                "regions": len(locked.regions),
                "kernels": len(locked.kernels.table),
                "kernels_skipped": locked.kernels.skipped,
                "passes": {name: entry.matches for name, entry in locked.passes.items()},
            }
        )
        return
    skipped = f" (no kernel table: {locked.kernels.skipped})" if locked.kernels.skipped else ""
    click.echo(f"{output}: {len(locked.regions)} regions, {len(locked.kernels.table)} kernels{skipped}")

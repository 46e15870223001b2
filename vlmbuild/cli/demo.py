"""The command `vlmbuild demo`."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from vlmbuild.artifact.output import output_errors
from vlmbuild.cli.options import json_option
from vlmbuild.cli.output import print_json
from vlmbuild.zoo import CHECKPOINTS


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the artifact and the adapter.  [default: a temporary folder]",
)
@click.option(
    "--family",
    type=click.Choice(list(CHECKPOINTS)),
    default="qwen2_vl",
    show_default=True,
    help="Model family of the demo checkpoint.",
)
@json_option
def command(output: Path | None, family: str, as_json: bool) -> None:
    """Run the whole pipeline on a tiny model.

    Plans, builds, verifies, loads and fine-tunes a checkpoint that ships with vlmbuild, offline and on a CPU.

    \b
    Examples:
        vlmbuild demo -o digits-demo
        vlmbuild demo --family pixtral
    """
    with _folder(output) as folder:
        _run(folder, family, as_json=as_json)


@contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    """Create the folder; a temporary one is removed if the demo does not end."""
    if output is not None:
        with output_errors(output):
            output.mkdir(exist_ok=True)
        yield output
        return
    folder = Path(tempfile.mkdtemp(prefix="vlmbuild-demo-"))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _run(output: Path, family: str, *, as_json: bool) -> None:
    click.echo(f"The demo takes about two minutes. Artifact and adapter are written to {output}.", err=as_json)

    from vlmbuild.demo.run import run

    result = run(output, family=family, echo=functools.partial(click.echo, err=as_json))
    if as_json:
        print_json(asdict(result))

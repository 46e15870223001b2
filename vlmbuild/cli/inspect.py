"""The command `vlmbuild inspect`: an artifact as a table, as JSON, as a page, or as a file for graph viewers."""

from __future__ import annotations

import json
from pathlib import Path

import click

from vlmbuild.artifact.hub import artifact_directory
from vlmbuild.artifact.output import check_file, output_errors
from vlmbuild.cli.options import json_option, revision_option
from vlmbuild.cli.output import StageProgress, show
from vlmbuild.errors import UsageError
from vlmbuild.report.contents import contents
from vlmbuild.report.tables import inspect_report


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE.html", help="Write one self-contained page.")
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "json", "dot", "model-explorer"]),
    default="text",
    show_default=True,
    help="dot is for Graphviz and Netron, model-explorer is the JSON of Google's Model Explorer.",
)
@revision_option
@json_option
def command(artifact: Path, html: Path | None, style: str, revision: str | None, as_json: bool) -> None:
    """Show the contents of an artifact.

    ARTIFACT is a folder, or the hub id of an artifact, which is downloaded into the hub's cache.

    Prints its id, recipe, files, regions, passes and weights. The page of --html also shows costs, the effect
    of each pass, quantization decisions and parity; it works offline.

    \b
    Examples:
        vlmbuild inspect qwen2-vl-nf4
        vlmbuild inspect qwen2-vl-nf4 --html report.html
        vlmbuild inspect qwen2-vl-nf4 --format dot > graph.dot
    """
    if (html is not None) + (style != "text") + as_json > 1:
        raise UsageError("--html, --format and --json exclude each other. Pass only one of them.")
    with StageProgress(lines=False) as progress:
        directory = artifact_directory(artifact, revision, progress)
    if html is not None:
        _write_page(directory, html)
    elif style in ("dot", "model-explorer"):
        click.echo(_graph_file(directory, style), nl=False)
    else:
        show(contents(directory), inspect_report, as_json=as_json or style == "json")


def _write_page(artifact: Path, html: Path) -> None:
    check_file(html)
    with StageProgress() as progress:
        from vlmbuild.report.html import page

        text = page(artifact, progress)
    with output_errors(html):
        html.write_text(text, encoding="utf-8")
    click.echo(f"{html}: {len(text.encode()):,} bytes")


def _graph_file(artifact: Path, style: str) -> str:
    from vlmbuild.artifact.reader import ArtifactReader
    from vlmbuild.ir.shapes import annotate_shapes
    from vlmbuild.report.exchange import to_dot, to_model_explorer
    from vlmbuild.runtime.bind import read_program

    program = read_program(ArtifactReader(artifact, verify=False))
    annotate_shapes(program)
    return to_dot(program) if style == "dot" else json.dumps(to_model_explorer(program), indent=1) + "\n"

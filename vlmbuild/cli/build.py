"""The command `vlmbuild build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vlmbuild.artifact.output import check_output
from vlmbuild.checkpoint.source import Source, resolve
from vlmbuild.cli.options import json_option, recipe_from, recipe_options, revision_option
from vlmbuild.cli.output import StageProgress, show
from vlmbuild.report.contents import contents
from vlmbuild.report.tables import build_report

PACKAGED = "packaged"
"""Value of --golden without a file of one's own."""


@click.command()
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT", help="Folder to create.")
@recipe_options
@click.option("--overwrite", is_flag=True, help="Replace an existing artifact, in one step at the end.")
@revision_option
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Device that quantizes weights.",
)
@click.option(
    "--calibrate",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.jsonl",
    help='Conversations to measure layers on (auto), one per line: {"messages": [...]}.',
)
@click.option(
    "--adapter",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Merge a LoRA adapter in PEFT's format. The result is unquantized unless --quantize is given.",
)
@click.option(
    "--golden",
    metavar="packaged|FILE.jsonl",
    help='Record in the artifact what its program computes for packaged prompts and images, or for your own: {"messages": '
    "[...]} per line. `vlmbuild verify --engine` compares engines with it. The targets gguf and compressed-tensors always "
    "record some; aoti cannot.",
)
@click.option(
    "--allow-other-base", is_flag=True, help="Merge an adapter that was trained on other weights or another processor."
)
@click.option("--processor", metavar="DIR_OR_ID", help="Source of the processor's files.  [default: SOURCE]")
@click.option(
    "--strip-prefix", default="", metavar="PREFIX", help="Prefix to drop from all tensor names, such as 'module.'."
)
@json_option
def command(
    source: str,
    output: Path,
    overwrite: bool,
    revision: str | None,
    device: str,
    calibrate: Path | None,
    adapter: Path | None,
    allow_other_base: bool,
    golden: str | None,
    processor: str | None,
    strip_prefix: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Build an artifact from a checkpoint.

    SOURCE is a checkpoint folder, a hub id, or the name of a packaged checkpoint, such as qwen2-vl-digits. OUT is created
    complete or not at all. With the target trainable it is an ordinary Hugging Face checkpoint with the compiled graph
    beside it.

    \b
    Examples:
        vlmbuild build qwen2-vl-digits -o digits-nf4 --quantize nf4
        vlmbuild build Qwen/Qwen2-VL-2B-Instruct -o qwen2-vl-nf4 --quantize nf4
        vlmbuild build ./my-checkpoint -o my-model --dtype float32 --overwrite
        vlmbuild build qwen2-vl-nf4 -o qwen2-vl-bf16 --quantize none
        vlmbuild build qwen2-vl-digits -o digits-5 --quantize auto --budget 5bpw
        vlmbuild build qwen2-vl-nf4 -o qwen2-vl-merged --adapter my-adapter
    """
    recipe = recipe_from(options)
    recipe.check_calibration(calibrate is not None)
    check_output(output, overwrite=overwrite)
    with StageProgress(lines=not as_json) as progress:
        found = resolve(source, revision=revision, progress=progress)
        found.config()  # a malformed one is refused before torch is imported

        from vlmbuild.builder.build import build

        artifact = build(
            found,
            output,
            recipe,
            overwrite=overwrite,
            device=device,
            calibration=[] if calibrate is None else _calibration(found, calibrate, processor),
            adapter=adapter,
            allow_other_base=allow_other_base,
            processor=processor,
            golden={None: False, PACKAGED: True}.get(golden, golden or False),
            strip_prefix=strip_prefix,
            progress=progress,
        )
    show(contents(artifact.path), build_report, as_json=as_json)


def _calibration(source: Source, file: Path, processor: str | None) -> list[Any]:
    from vlmbuild.checkpoint.checkpoint import Checkpoint
    from vlmbuild.measure.calibration import conversation_batches

    return list(conversation_batches(file, Checkpoint.open(source, processor=processor).processor))

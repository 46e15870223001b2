"""The command `vlmbuild plan`."""

from __future__ import annotations

import re
from typing import Any

import click

from vlmbuild.checkpoint.source import resolve
from vlmbuild.cli.options import check_image, device_option, json_option, recipe_from, recipe_options, revision_option
from vlmbuild.cli.output import StageProgress, show
from vlmbuild.report.tables import plan_report

_POSITIVE = click.IntRange(1, 2**31 - 1)


@click.command()
@click.argument("source")
@recipe_options
@click.option("--image", "images", multiple=True, metavar="FILE|HxW", help="An image in every sample. Repeatable.")
@click.option(
    "--longest-edge",
    type=_POSITIVE,
    help="Replace size.longest_edge of the image processor (in its unit: pixels of an image, or of a side).",
)
@click.option("--shortest-edge", type=_POSITIVE, help="Replace size.shortest_edge of the image processor.")
@click.option("--batch", type=_POSITIVE, default=1, show_default=True, help="Samples per batch.")
@click.option("--text-tokens", type=_POSITIVE, default=256, show_default=True, help="Text tokens per sample.")
@click.option("--rank", type=_POSITIVE, default=16, show_default=True, help="LoRA rank for the training estimate.")
@device_option
@revision_option
@json_option
def command(
    source: str,
    images: tuple[str, ...],
    longest_edge: int | None,
    shortest_edge: int | None,
    batch: int,
    text_tokens: int,
    rank: int,
    device: str | None,
    revision: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Estimate the graph and the memory of a build.

    Only the config.json of SOURCE is read; weights are neither read nor downloaded. The estimates cover loading the
    model, inference (one forward pass), and training a LoRA adapter with AdamW, with and without gradient checkpointing;
    with --target onnx, the files of weights in their place.

    \b
    Examples:
        vlmbuild plan Qwen/Qwen2-VL-72B-Instruct --quantize nf4 --image 1080x1920
        vlmbuild plan ./my-checkpoint --image a.jpg --batch 8 --text-tokens 512
        vlmbuild plan ./my-checkpoint --image 2000x3000 --longest-edge 1003520
        vlmbuild plan ./my-checkpoint --target onnx --quantize int4
    """
    recipe = recipe_from(options)
    sizes = [_image(image) for image in images]
    with StageProgress(lines=not as_json) as progress:
        found = resolve(source, revision=revision, weights=False, progress=progress)
        found.config()  # a malformed one is refused before torch is imported

        from vlmbuild.planner.memory import Workload
        from vlmbuild.planner.plan import plan
        from vlmbuild.runtime.load import best_device

        edges = {"longest_edge": longest_edge, "shortest_edge": shortest_edge}
        planned = plan(
            found,
            recipe,
            images=sizes,
            limits={name: edge for name, edge in edges.items() if edge is not None},
            workload=Workload(batch, text_tokens, rank, device or best_device(recipe.target)),
            progress=progress,
        )
    show(planned.to_json(), plan_report, as_json=as_json)


def _image(text: str) -> str | tuple[int, int]:
    size = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if size:
        return int(size[1]), int(size[2])
    check_image(text, "a file or HEIGHTxWIDTH")
    return text

"""The command `vlmbuild run`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.cli.options import json_option, trust_option
from vlmbuild.cli.output import print_json
from vlmbuild.errors import UsageError


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text of the user's turn.")
@click.option("--image", "images", multiple=True, metavar="FILE", help="Image before the prompt. Repeatable.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Stop after this many tokens."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, max=100),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 means greedy decoding.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Device to run on."
)
@trust_option
@json_option
def command(
    artifact: Path,
    prompt: str,
    images: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    device: str,
    trust_code: bool,
    as_json: bool,
) -> None:
    """Generate an answer to a prompt with images.

    Prints the answer while it is generated. With --json, prints the complete answer with token counts and seconds.

    \b
    Examples:
        vlmbuild run qwen2-vl-nf4 --image photo.jpg --prompt "What is in the picture?"
        vlmbuild run qwen2-vl-nf4 --image a.jpg --image b.jpg --prompt "What differs?" --max-new-tokens 64
        vlmbuild run qwen2-vl-nf4 --prompt "Write a haiku." --temperature 0.7
    """
    if not prompt.strip():
        raise UsageError('The prompt is empty. Pass a question, such as --prompt "What is in the picture?".')
    ArtifactReader(artifact, verify=False)  # refuse a folder that is no artifact before torch is imported

    from vlmbuild.cli.answer import answer

    def write(text: str) -> None:
        if not as_json:
            click.echo(text, nl=False)

    result = answer(
        artifact,
        prompt,
        images,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        device=device,
        write=write,
        trust=("code",) if trust_code else (),
    )
    if as_json:
        print_json(asdict(result))
    else:
        click.echo()

"""The command `vlmbuild run`: ask an artifact about images."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from vlmbuild.cli.options import json_option, trust_option


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="What to ask.")
@click.option("--image", "images", multiple=True, metavar="FILE", help="An image, before the prompt. Repeatable.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Cut the answer here."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, max=100),
    default=0.0,
    show_default=True,
    help="Of sampling; 0 takes the most probable token every time.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to run.")
@trust_option
@json_option
def run(
    artifact: Path,
    prompt: str,
    images: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    device: str,
    trust_code: bool,
    as_json: bool,
) -> None:
    """Ask an artifact about images.

    The answer appears on stdout while it is generated. With --json it comes whole, with the number of tokens and the
    seconds that they took.

    \b
    Examples:
        vlmbuild run qwen2-vl-nf4 --image photo.jpg --prompt "What is in the picture?"
        vlmbuild run qwen2-vl-nf4 --image a.jpg --image b.jpg --prompt "What differs?" --max-new-tokens 64
        vlmbuild run qwen2-vl-nf4 --prompt "Write a haiku." --temperature 0.7
    """
    from vlmbuild.cli.ask import ask

    def write(text: str) -> None:
        if not as_json:
            click.echo(text, nl=False)

    answer = ask(
        artifact,
        prompt,
        images,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        device=device,
        write=write,
        trust=("code",) if trust_code else (),
    )
    click.echo(json.dumps(asdict(answer), indent=2) if as_json else "")

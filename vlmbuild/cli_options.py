"""Options that several commands share, and what they make: a recipe, a workload. Nothing here imports torch by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from vlmbuild.errors import UsageError
from vlmbuild.recipe import ATTENTIONS, DTYPES, FORMATS, TARGETS, QuantSpec, Recipe

Command = Callable[..., Any]

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


def recipe_options(command: Command) -> Command:
    """The options that make a recipe; the command is called with `recipe`."""

    @click.option("--target", type=click.Choice(TARGETS), help="What to write.  [default: trainable]")
    @click.option(
        "--quantize", type=click.Choice(["none", *FORMATS]), help="4-bit format of the language model.  [default: none]"
    )
    @click.option(
        "--attention",
        type=click.Choice(ATTENTIONS),
        help="Attention kernel; auto is Triton on CUDA, else SDPA.  [default: auto]",
    )
    @click.option(
        "--dtype", type=click.Choice(DTYPES), help="Of unquantized weights and of the computation.  [default: bfloat16]"
    )
    @click.option(
        "--require", multiple=True, metavar="PASS", help="Fail unless this pass rewrites something. Repeatable."
    )
    @click.option(
        "--skip", multiple=True, metavar="PATTERN", help="Do not quantize modules like '*.o_proj'. Repeatable."
    )
    @click.option(
        "--recipe",
        "file",
        type=click.Path(path_type=Path),
        metavar="FILE.toml",
        help="Read options from a file; those given here win.",
    )
    @functools.wraps(command)
    def with_recipe(
        target: str | None, quantize: str | None, attention: str | None, dtype: str | None,
        require: tuple[str, ...], skip: tuple[str, ...], file: Path | None, **options: Any,
    ) -> Any:  # fmt: skip
        given = {"target": target, "attention": attention, "dtype": dtype, "require": require or None}
        return command(
            recipe=_recipe(file, quantize, skip, {k: v for k, v in given.items() if v is not None}), **options
        )

    return with_recipe


def _recipe(file: Path | None, quantize: str | None, skip: tuple[str, ...], given: Mapping[str, Any]) -> Recipe:
    """The file's recipe with what was given on the command line in its place; a format keeps the file's other settings."""
    recipe = replace(Recipe() if file is None else Recipe.from_toml(file), **given)
    if quantize == "none":
        recipe = replace(recipe, quantize=None)
    elif quantize is not None:
        recipe = replace(recipe, quantize=replace(recipe.quantize or QuantSpec(), format=quantize))  # type: ignore[arg-type]
    if skip and recipe.quantize is None:
        raise UsageError("--skip keeps layers from being quantized, but nothing is. Add --quantize nf4, or drop it.")
    if skip and recipe.quantize is not None:
        recipe = replace(recipe, quantize=replace(recipe.quantize, skip=skip))
    return recipe


def workload_options(command: Command) -> Command:
    """The options that make a workload; the command is called with `workload`."""

    @click.option(
        "--batch", default=1, show_default=True, help="Samples that memory is for; each has all of the images."
    )
    @click.option(
        "--text-tokens", default=256, show_default=True, help="Tokens of each sample, besides those of its images."
    )
    @click.option("--rank", default=16, show_default=True, help="LoRA rank that memory for training is for.")
    @click.option(
        "--device",
        type=click.Choice(["cuda", "cpu"]),
        default="cuda",
        show_default=True,
        help="Where the model would run.",
    )
    @functools.wraps(command)
    def with_workload(batch: int, text_tokens: int, rank: int, device: str, **options: Any) -> Any:
        from vlmbuild.memory import Workload

        return command(workload=Workload(batch, text_tokens, rank, device), **options)

    return with_workload


def limit_options(command: Command) -> Command:
    """Limits in place of the image processor's own; the command is called with `limits`."""

    @click.option(
        "--longest-edge",
        type=click.IntRange(min=1),
        help="In place of the image processor's size.longest_edge, in its unit: pixels of an image, or of a side.",
    )
    @click.option("--shortest-edge", type=click.IntRange(min=1), help="The same for size.shortest_edge.")
    @functools.wraps(command)
    def with_limits(longest_edge: int | None, shortest_edge: int | None, **options: Any) -> Any:
        given = {"longest_edge": longest_edge, "shortest_edge": shortest_edge}
        return command(limits={name: edge for name, edge in given.items() if edge is not None}, **options)

    return with_limits

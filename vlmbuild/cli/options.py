"""Options that several commands share, and what they make: a recipe, a workload. Nothing here imports torch by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from vlmbuild.errors import UsageError
from vlmbuild.quant.spec import FORMATS, FOUR_BIT, QUANTIZE, ROLES, Override, QuantSpec
from vlmbuild.recipe import ATTENTIONS, DTYPES, TARGETS, Recipe

Command = Callable[..., Any]

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
trust_option = click.option(
    "--trust-code", is_flag=True, help="Run the artifact's compiled code, which has all your rights (target aoti)."
)


@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """What was given on the command line of a recipe.

    Attributes:
        file: A recipe file, or None.
        spec: Of quantization.
        others: The rest.
    """

    file: Path | None
    spec: Mapping[str, Any]
    others: Mapping[str, Any]

    def given(self) -> bool:
        """Whether there is any."""
        return bool(self.file is not None or self.spec or self.others)

    def over(self, base: Recipe) -> Recipe:
        """A recipe with what was given in its place; a file replaces it whole, a format keeps its other settings."""
        if self.file is None:
            dtype = {"dtype": None} if "target" in self.others else {}  # a target has a default of its own
            recipe = replace(base, **{**dtype, **self.others})
        else:
            recipe = Recipe.from_toml(self.file, **self.others)
        if not self.spec:
            return recipe
        known = recipe.quantize or QuantSpec("source")
        form = self.spec.get("format", known.format)
        _check_used(self.spec, form)
        if known.budget is not None and form != "auto":
            known = replace(known, format="nf4", budget=None)
        return replace(recipe, quantize=replace(known, **self.spec))


def recipe_options(command: Command) -> Command:
    """The options that make a recipe; the command is called with `recipe`."""

    @functools.wraps(command)
    def with_recipe(options: RecipeOptions, **others: Any) -> Any:
        return command(recipe=options.over(Recipe()), **others)

    return recipe_option_values(with_recipe)


def recipe_option_values(command: Command) -> Command:
    """The same options; the command is called with `options`, `RecipeOptions`."""

    @click.option("--target", type=click.Choice(TARGETS), help="What to write.  [default: trainable]")
    @click.option(
        "--quantize",
        type=click.Choice(QUANTIZE),
        help="Format of the linear layers; none also dequantizes a source.  [default: as in the source]",
    )
    @click.option("--blocksize", type=int, help="Weights per scale of 4-bit formats.  [default: 64]")
    @click.option(
        "--double-quant/--no-double-quant", default=None, help="Scales of 4-bit weights in 8 bits.  [default: yes]"
    )
    @click.option(
        "--symmetric/--asymmetric",
        default=None,
        help="For int4: blocks without a zero point, or with.  [default: without]",
    )
    @click.option(
        "--exact-inputs/--rounded-inputs",
        default=None,
        help="For int4: products of the inputs' own values, or of those rounded to 8 bits, faster.  [default: rounded]",
    )
    @click.option(
        "--quantize-role",
        "roles",
        multiple=True,
        type=click.Choice(ROLES),
        help="Whose linear layers. Repeatable.  [default: language]",
    )
    @click.option(
        "--quantize-module",
        "overrides",
        multiple=True,
        metavar="PATTERN=FORMAT",
        help="Another format for modules like '*.down_proj=int8'. Repeatable.",
    )
    @click.option(
        "--skip",
        multiple=True,
        metavar="PATTERN",
        help="Modules like '*.o_proj' keep their dtype, and are dequantized if a source has them quantized. Repeatable.",
    )
    @click.option("--budget", metavar="BPW", help="For auto: bits per weight, with scales, as in 5.0bpw.")
    @click.option(
        "--attention",
        type=click.Choice(ATTENTIONS),
        help="Attention kernel; auto is Triton on CUDA, else SDPA.  [default: auto]",
    )
    @click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Of plain weights and of the computation.  [default: bfloat16; onnx: float32]",
    )
    @click.option(
        "--require", multiple=True, metavar="PASS", help="Fail unless this pass rewrites something. Repeatable."
    )
    @click.option(
        "--recipe",
        "file",
        type=click.Path(path_type=Path),
        metavar="FILE.toml",
        help="Read options from a file; those given here win.",
    )
    @functools.wraps(command)
    def with_options(
        target: str | None,
        quantize: str | None,
        blocksize: int | None,
        double_quant: bool | None,
        symmetric: bool | None,
        exact_inputs: bool | None,
        roles: tuple[str, ...],
        overrides: tuple[str, ...],
        skip: tuple[str, ...],
        budget: str | None,
        attention: str | None,
        dtype: str | None,
        require: tuple[str, ...],
        file: Path | None,
        **others: Any,
    ) -> Any:
        details = _given(
            {
                "blocksize": blocksize,
                "double_quant": double_quant,
                "symmetric": symmetric,
                "exact_inputs": exact_inputs,
            }
        )
        given = {"target": target, "attention": attention, "dtype": dtype, "require": require or None}
        spec = {
            "format": quantize,
            "blocksize": blocksize,
            "double_quant": double_quant,
            "roles": roles or None,
            "overrides": tuple(_override(text, details) for text in overrides) or None,
            "skip": skip or None,
            "budget": budget,
            "symmetric": symmetric,
            "exact_inputs": exact_inputs,
        }
        return command(options=RecipeOptions(file, _given(spec), _given(given)), **others)

    return with_options


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _override(text: str, details: Mapping[str, Any]) -> Override:
    pattern, separator, form = text.rpartition("=")
    if not separator:
        raise UsageError(f"--quantize-module {text!r} is not PATTERN=FORMAT, for example '*.down_proj=int8'.")
    int4 = {"int4": ("blocksize", "symmetric", "exact_inputs")}
    own = {**dict.fromkeys(FOUR_BIT, ("blocksize", "double_quant")), **int4}.get(form, ())
    return Override(pattern, form, **{name: details[name] for name in own if name in details})  # type: ignore[arg-type]


def _check_used(spec: Mapping[str, Any], form: str) -> None:
    """Refuse options that would change nothing."""
    formats = {form, *(item.format for item in spec.get("overrides", ()))}
    uses = {
        "blocksize": formats & {*FOUR_BIT, "int4", "auto"},
        "symmetric": formats & {"int4"},
        "exact_inputs": formats & {"int4"},
        "double_quant": formats & {*FOUR_BIT, "auto"},
        "roles": formats & {*FORMATS, "auto"},
        "skip": formats & {*FORMATS, "auto"},
        "budget": form == "auto",
    }
    names = {"roles": "--quantize-role", "double_quant": "--double-quant", "exact_inputs": "--exact-inputs"}
    for name, used in uses.items():
        if name in spec and not used:
            remedy = {"budget": "auto", "symmetric": "int4", "exact_inputs": "int4"}.get(name, "nf4")
            raise UsageError(
                f"{names.get(name, f'--{name}')} changes nothing without a format for it. Add --quantize {remedy}, or drop it."
            )


def build_options(command: Command) -> Command:
    """What a build takes besides its recipe; the command is called with each."""

    @click.option("--overwrite", is_flag=True, help="Replace an artifact that is there, in one step at the end.")
    @click.option("--revision", help="Branch, tag or commit of a hub id.")
    @click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
        show_default=True,
        help="Where weights are quantized.",
    )
    @click.option(
        "--calibrate",
        type=click.Path(path_type=Path),
        metavar="FILE.jsonl",
        help='For auto: conversations to measure layers on, one a line: {"messages": [...]}.',
    )
    @click.option(
        "--adapter",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Merge a LoRA adapter (PEFT's format); the result is unquantized unless --quantize says otherwise.",
    )
    @functools.wraps(command)
    def with_build(**options: Any) -> Any:
        return command(**options)

    return with_build


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
        from vlmbuild.planner.memory import Workload

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

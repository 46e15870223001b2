"""Options that several commands share. Options of recipes are derived from the fields of `Recipe` and `QuantSpec`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from vlmbuild.errors import UsageError
from vlmbuild.formats import FORMATS
from vlmbuild.locks.difference import SEVERITIES
from vlmbuild.quant.spec import ROLES, QuantSpec, option_names, option_types, quantize_choices
from vlmbuild.recipe import TARGET_OPTIONS, Recipe

Command = Callable[..., Any]

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
revision_option = click.option("--revision", help="Branch, tag or commit of a hub id.")
trust_option = click.option(
    "--trust-code", is_flag=True, help="Run the compiled code of an aoti artifact, with all your permissions."
)

_FLAGS = {
    "format": "--quantize",
    "roles": "--quantize-role",
    "overrides": "--quantize-module",
    "symmetric": "--symmetric/--asymmetric",
    "exact_inputs": "--exact-inputs/--rounded-inputs",
}
"""Fields whose option has another name than the field."""

_CHOICES = {"format": quantize_choices(), "roles": ROLES, "target": tuple(TARGET_OPTIONS)}
_METAVARS = {"overrides": "PATTERN=FORMAT", "skip": "PATTERN", "budget": "BPW", "require": "PASS"}
_HELP = {
    "target": "Kind of artifact.  [default: trainable]",
    "format": "Weight format of linear layers; none also dequantizes a quantized source.  [default: keep the source's]",
    "blocksize": "Weights per scale (nf4, fp4, int4, auto).  [default: 64]",
    "double_quant": "Store the scales of nf4, fp4 and auto in 8 bits.  [default: yes]",
    "skip": "Keep modules such as '*.o_proj' unquantized. Repeatable.",
    "roles": "Part of the model whose linear layers are quantized. Repeatable.  [default: language]",
    "overrides": "Format of matching modules, such as '*.down_proj=int8'. Repeatable; the first match wins.",
    "threshold": "Compute input columns with a value above this in 16 bits (int8).  [default: 6.0]",
    "budget": "Average bits per weight, scales included, such as 5.0bpw (auto).",
    "symmetric": "Center blocks on zero, or store a zero point for each (int4).  [default: symmetric]",
    "exact_inputs": "Multiply by exact inputs, or by inputs rounded to 8 bits, which is faster (int4).  [default: rounded]",
    "attention": (
        "Attention kernel; auto uses Triton only where it was measured on the GPU, or for groups of keys.  [default: auto]"
    ),
    "dtype": "Dtype of computation and unquantized weights.  [default: bfloat16; onnx: float32]",
    "require": "Fail unless this pass rewrites something. Repeatable.",
}
format_option = click.option(
    "--format",
    "style",
    type=click.Choice(["text", "markdown"]),
    default="text",
    show_default=True,
    help="Report format; markdown suits pull-request comments.",
)
kernels_option = click.option(
    "--kernels/--no-kernels",
    default=True,
    show_default=True,
    help="Compile Triton kernels ahead of time; no GPU is needed.",
)
fail_option = click.option(
    "--fail-on",
    "limit",
    type=click.Choice(SEVERITIES),
    default="cosmetic",
    show_default=True,
    help="Least severe difference that exits with 6; cosmetic means any.",
)


@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """Recipe options of one command line; only options that were passed.

    Attributes:
        file: Recipe file, or None.
        spec: Fields of `QuantSpec`.
        others: Fields of `Recipe`.
    """

    file: Path | None
    spec: Mapping[str, Any]
    others: Mapping[str, Any]

    def __bool__(self) -> bool:
        return bool(self.file is not None or self.spec or self.others)

    def over(self, base: Recipe) -> Recipe:
        """Apply the options to `base`: a file replaces it, other options replace single fields."""
        if self.file is None:
            dtype = {"dtype": None} if "target" in self.others else {}  # each target has its own default
            recipe = replace(base, **{**dtype, **self.others})
        else:
            recipe = Recipe.from_toml(self.file, **self.others)
        if not self.spec:
            return recipe
        known = recipe.quantize or QuantSpec("source")
        form = self.spec.get("format", known.format)
        _check_effect(self.spec, form)
        own = {"format", "roles", "skip", "overrides", *option_names(form)}  # other options are for overrides
        return replace(recipe, quantize=known.changed(**{name: v for name, v in self.spec.items() if name in own}))


def recipe_options(command: Command) -> Command:
    """Add the options of a recipe; the command takes `recipe`."""

    @functools.wraps(command)
    def with_recipe(options: RecipeOptions, **others: Any) -> Any:
        return command(recipe=options.over(Recipe()), **others)

    return recipe_option_values(with_recipe)


def recipe_option_values(command: Command) -> Command:
    """Add the options of a recipe; the command takes `options`, a `RecipeOptions`."""
    hints = get_type_hints(Recipe)
    of_recipe = dict(_derived({entry.name: hints[entry.name] for entry in fields(Recipe) if entry.name != "quantize"}))
    of_spec = dict(_derived(option_types()))
    file = click.option(
        "--recipe",
        "recipe_file",
        type=click.Path(path_type=Path),
        metavar="FILE.toml",
        help="Read options from a file; options on the command line win.",
    )

    @functools.wraps(command)
    def with_options(recipe_file: Path | None, **options: Any) -> Any:
        spec = _passed({name: options.pop(name) for name in of_spec})
        others = _passed({name: options.pop(name) for name in of_recipe})
        if "overrides" in spec:
            spec["overrides"] = [_override(text, spec) for text in spec["overrides"]]
        return command(options=RecipeOptions(recipe_file, spec, others), **options)

    ordered = {"target": of_recipe["target"], **of_spec, **of_recipe}
    command_with_options: Command = with_options
    decorators: list[Callable[[Command], Command]] = [*ordered.values(), file]
    for option in reversed(decorators):  # the last decorator is listed first
        command_with_options = option(command_with_options)
    return command_with_options


def _derived(hints: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[Command], Command]]]:
    """Yield each argument's name and its option."""
    for name, hint in hints.items():
        flag = _FLAGS.get(name, _flag(name, boolean=bool in _members(hint)))
        settings: dict[str, Any] = {"help": _HELP.get(name), "metavar": _METAVARS.get(name), "default": None}
        yield name, click.option(flag, name, **settings, **_option_type(name, hint))


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the type itself."""
    return (hint,) if get_origin(hint) in (None, Literal, tuple) else get_args(hint)


def _option_type(name: str, hint: Any) -> dict[str, Any]:
    """Derive settings of `click.option` from the type of a field."""
    kind = next(member for member in _members(hint) if member is not type(None))
    several = {"multiple": True} if get_origin(kind) is tuple else {}
    if several or name in _CHOICES:
        return {**several, "type": click.Choice(_CHOICES[name]) if name in _CHOICES else str}
    if get_origin(kind) is Literal:
        return {"type": click.Choice(get_args(kind))}
    return {} if kind is bool else {"type": kind}


def _flag(name: str, *, boolean: bool = False) -> str:
    flag = name.replace("_", "-")
    return f"--{flag}/--no-{flag}" if boolean else f"--{flag}"


def _passed(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None and value != ()}


def _override(text: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Parse PATTERN=FORMAT; details of the format, such as --blocksize, apply to it too."""
    pattern, separator, form = text.rpartition("=")
    if not separator:
        raise UsageError(f"--quantize-module {text!r} is not PATTERN=FORMAT. Pass, for example, '*.down_proj=int8'.")
    own = option_names(form) if form in FORMATS else ()
    details = {name: spec[name] for name in own if name in spec}
    return {"pattern": pattern, "format": form, **details}


def _check_effect(spec: Mapping[str, Any], form: str) -> None:
    """Refuse options that would have no effect."""
    formats = {form, *(item["format"] for item in spec.get("overrides", ()))}
    for name in spec:
        suitable = _formats_with(name)
        if suitable and formats.isdisjoint(suitable):
            flag = _FLAGS.get(name, _flag(name)).partition("/")[0]
            raise UsageError(f"{flag} has no effect on {form} weights. Add --quantize {suitable[0]}, or drop {flag}.")


def _formats_with(option: str) -> tuple[str, ...]:
    """Return the formats that an option has an effect on; () if it has one on all."""
    if option in ("format", "overrides"):
        return ()
    names = [name for name in (*FORMATS, "auto") if option in option_names(name)]
    return tuple(names) or (*FORMATS, "auto")  # options that choose layers have an effect on all

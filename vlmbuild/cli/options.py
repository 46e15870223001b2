"""Options that several commands share. Options of recipes are derived from the fields of `Recipe` and `QuantSpec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_origin

import click

from vlmbuild.errors import UsageError
from vlmbuild.formats import FORMATS
from vlmbuild.locks.difference import SEVERITIES
from vlmbuild.quant.spec import ROLES, QuantSpec, option_names, option_types, quantize_choices
from vlmbuild.recipe import ATTENTIONS, DTYPES, TARGET_OPTIONS, Recipe

Command = Callable[..., Any]

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
id_option = click.option("--id", "expected_id", metavar="sha256:…", help="Fail unless the artifact has this id.")
revision_option = click.option("--revision", help="Branch, tag or commit of a hub id; or write ID@REVISION.")
trust_option = click.option(
    "--trust-code", is_flag=True, help="Run the compiled code of an aoti artifact, with all your permissions."
)
device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Device the model runs on.  [default: cuda if there is one, else cpu]",
)
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

_FLAGS = {
    "format": "--quantize",
    "roles": "--quantize-role",
    "overrides": "--quantize-module",
    "symmetric": "--symmetric/--asymmetric",
    "exact_inputs": "--exact-inputs/--rounded-inputs",
}
"""Fields whose option has another name than the field."""

_CHOICES = {
    "target": tuple(TARGET_OPTIONS),
    "format": quantize_choices(),
    "attention": ATTENTIONS,
    "dtype": DTYPES,
}
_METAVARS = {
    "format": "FORMAT",
    "roles": "ROLE[=FORMAT]",
    "overrides": "PATTERN=FORMAT",
    "skip": "PATTERN",
    "budget": "BPW",
    "require": "PASS",
}
_HELP = {
    "target": (
        "Kind of artifact: trainable is a torch model and a Hugging Face checkpoint, onnx is for ONNX Runtime, aoti is "
        "compiled for CPUs, compressed-tensors is for vLLM and SGLang, gguf is for llama.cpp.  [default: trainable]"
    ),
    "format": (
        f"Weight format of linear layers: {', '.join(quantize_choices())}. source keeps the checkpoint's, none also "
        "dequantizes, auto chooses one for each layer within --budget.  [default: source]"
    ),
    "blocksize": "Weights per scale (nf4, fp4, int4, auto).  [default: 64]",
    "group_size": "Weights per scale (w4a16).  [default: 128; less where rows are no multiple]",
    "double_quant": "Store the scales of nf4, fp4 and auto in 8 bits.  [default: yes]",
    "skip": "Keep modules such as '*.o_proj' unquantized. Repeatable.",
    "roles": (
        f"Part to quantize ({', '.join(ROLES)}; embedding in onnx and gguf), or with a format of its own, such as "
        "vision=int8. Repeatable.  [default: language; with int4 the others too, in int8; for gguf also embedding and head]"
    ),
    "overrides": "Format of matching modules, such as '*.down_proj=int8'. Repeatable; the first match wins.",
    "threshold": "Compute input columns with a value above this in 16 bits (int8).  [default: 6.0]",
    "budget": "Average bits per weight, scales included, such as 5.0bpw (auto).",
    "symmetric": "Center blocks on zero, or store a zero point for each (int4).  [default: symmetric]",
    "exact_inputs": "Multiply by exact inputs, or by inputs rounded to 8 bits, which is faster (int4).  [default: rounded]",
    "attention": (
        "Attention kernel; auto uses Triton only where it was measured on the GPU, or for masks that no torch kernel "
        "takes.  [default: auto]"
    ),
    "dtype": (
        "Dtype of computation and unquantized weights.  [default: that of a source artifact; else bfloat16; float32 for onnx, "
        "float16 for gguf]"
    ),
    "require": "Fail unless this pass, such as fuse_rope, rewrites something. Repeatable.",
}


def check_image(image: str, form: str) -> None:
    """Raise UsageError for an image that is no file, before torch is imported. Addresses are opened later."""
    if "://" not in image and not Path(image).is_file():
        raise UsageError(f"--image {image}: there is no such file. Pass {form}.")


def recipe_options(command: Command) -> Command:
    """Add the options of a recipe; the command passes them on to `recipe_from` or `recipe_change`."""
    recipe = {field.name: type(field.default) for field in fields(Recipe) if field.init and field.name != "quantize"}
    options = [_option(name, kind) for name, kind in {"target": str, **option_types(), **recipe}.items()]
    options.append(
        click.option(
            "--recipe",
            "recipe_file",
            type=click.Path(path_type=Path),
            metavar="FILE.toml",
            help="Read options from a file; options on the command line win.",
        )
    )
    for option in reversed(options):  # the last decorator is listed first
        command = option(command)
    return command


def recipe_from(options: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a command line."""
    change = recipe_change(options)
    return Recipe() if change is None else change(Recipe())


def recipe_change(options: Mapping[str, Any]) -> Callable[[Recipe], Recipe] | None:
    """Return what the options make of a recipe: a file replaces it, others replace single fields. None without options."""
    passed = {name: value for name, value in options.items() if value is not None and value != ()}
    file = passed.pop("recipe_file", None)
    spec = {name: passed.pop(name) for name in option_types() if name in passed}
    if "overrides" in spec:
        spec["overrides"] = [_override(text, spec) for text in spec["overrides"]]

    def change(recipe: Recipe) -> Recipe:
        if file is not None:
            recipe = Recipe.from_toml(file, **passed)
        else:
            dtype = {"dtype": None} if "target" in passed else {}  # each target has its own default
            recipe = recipe.changed(**{**dtype, **passed})
        return recipe.changed(quantize=_changed(recipe.quantize or QuantSpec("source"), spec)) if spec else recipe

    return change if passed or spec or file is not None else None


def _option(name: str, kind: Any) -> Callable[[Command], Command]:
    """Make the option of a field from its name and type."""
    flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
    if kind is bool and "/" not in flag:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    settings: dict[str, Any] = {"multiple": tuple in (kind, get_origin(kind)), "metavar": _METAVARS.get(name)}
    if name in _CHOICES:
        settings["type"] = click.Choice(_CHOICES[name])
    elif kind in (int, float):
        settings["type"] = kind
    return click.option(flag, name, default=None, help=_HELP.get(name), **settings)


def _override(text: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Parse PATTERN=FORMAT; details of the format, such as --blocksize, apply to it too."""
    pattern, separator, form = text.rpartition("=")
    if not separator:
        raise UsageError(f"--quantize-module {text!r} is not PATTERN=FORMAT. Pass, for example, '*.down_proj=int8'.")
    own = option_names(form) if form in FORMATS else ()
    return {"pattern": pattern, "format": form, **{name: spec[name] for name in own if name in spec}}


def _changed(known: QuantSpec, spec: Mapping[str, Any]) -> QuantSpec:
    """Apply options to a spec. Raises UsageError for one without effect."""
    form = spec.get("format", known.format)
    own = {"format", "roles", "skip", "overrides", *option_names(form)}  # other options are for overrides
    formats = {form, *(item["format"] for item in spec.get("overrides", ()))}
    for name in spec.keys() - {"format", "overrides"}:
        every = (*FORMATS, "auto")
        suitable = [other for other in every if name in option_names(other)] or every
        if formats.isdisjoint(suitable):
            flag = _FLAGS.get(name, f"--{name.replace('_', '-')}").partition("/")[0]
            raise UsageError(f"{flag} has no effect on {form} weights. Add --quantize {suitable[0]}, or drop {flag}.")
    return known.changed(**{name: value for name, value in spec.items() if name in own})

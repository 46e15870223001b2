"""The recipe of a build: frozen options, read from TOML, written as canonical JSON, hashed whole."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from vlmbuild.artifact.files import read_file
from vlmbuild.errors import UsageError
from vlmbuild.formats import FORMATS, format_class
from vlmbuild.quant.spec import ROLES, QuantSpec, quantize_choices, role_names
from vlmbuild.util.renamed import PASSES
from vlmbuild.util.validation import known_options, one_of, reachable, strings

__all__ = [
    "ATTENTIONS",
    "BUILD_TOOLS",
    "DTYPES",
    "TARGET_OPTIONS",
    "QuantSpec",
    "Recipe",
    "TargetOptions",
]

BUILD_TOOLS = ["vlmbuild", "torch", "transformers", "bitsandbytes"]
"""Distributions whose versions decide what a recipe's build writes; those of plugins in use join them."""

ATTENTIONS = ("auto", "triton", "sdpa")
DTYPES = ("float32", "bfloat16", "float16")
_MAX_FILE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """Recipe options that a target can build, and what its passes must know.

    Attributes:
        dtypes: Compute dtypes, the default first.
        attentions: Kernels behind the attention operator.
        formats: Names of weight formats; None is all that name the target (`WeightFormat.targets`).
        fuses_rms_norm: True if the target has a faster operator for RMS norms.
        packs_weights: True if the target stores packed weights, and graphs only mark their layers.
        packs_embeddings: True if lookups read packed weights too.
    """

    dtypes: tuple[str, ...] = ("bfloat16", "float32", "float16")
    attentions: tuple[str, ...] = ("auto", "sdpa")
    formats: tuple[str, ...] | None = None
    fuses_rms_norm: bool = False
    packs_weights: bool = False
    packs_embeddings: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles whose layers may be quantized: embeddings where lookups read packed weights."""
        return tuple(role for role in ROLES if role != "embedding" or self.packs_embeddings)


TARGET_OPTIONS: dict[str, TargetOptions] = {
    "trainable": TargetOptions(attentions=ATTENTIONS),
    "onnx": TargetOptions(
        dtypes=("float32", "float16"), fuses_rms_norm=True, packs_weights=True, packs_embeddings=True
    ),
    "aoti": TargetOptions(),
    "compressed-tensors": TargetOptions(packs_weights=True),
    "gguf": TargetOptions(dtypes=("float16", "bfloat16", "float32"), packs_weights=True, packs_embeddings=True),
}
"""By the target's name. `vlmbuild.targets.TARGETS` says how a target is written, `vlmbuild.runtime.load.OPENERS` how it is
opened; both are above this module."""


def formats_of_targets() -> dict[str, tuple[str, ...]]:
    """Return the names of the weight formats that each target can build."""
    classes = {name: format_class(name) for name in FORMATS}
    return {
        target: tuple(name for name in classes if target in classes[name].targets)
        if row.formats is None
        else row.formats
        for target, row in TARGET_OPTIONS.items()
    }


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that changes what a build writes, and nothing else.

    Attributes:
        target: Kind of artifact, a key of `TARGET_OPTIONS`.
        quantize: None leaves every weight as the source has it, in `dtype` or quantized.
        attention: The kernel behind the attention operator; "auto" takes torch's kernels, and Triton on a GPU where tiles.json
            says it was measured, or for masks that no torch kernel takes.
        dtype: Dtype of the stored unquantized weights and of the computation; None is that of a source which is an artifact,
            else the target's default.
        require: Names of passes that must match at least once, else the build fails.
        default_dtype: True if no dtype was given.
    """

    target: str = "trainable"
    quantize: QuantSpec | None = None
    attention: Literal["auto", "triton", "sdpa"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = None  # type: ignore[assignment]  # is set below
    require: tuple[str, ...] = ()
    default_dtype: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.quantize, QuantSpec | None):
            raise UsageError(f"quantize must be a QuantSpec or None; got {self.quantize!r}.")
        object.__setattr__(self, "require", strings(self.require, "require"))
        one_of("target", self.target, tuple(TARGET_OPTIONS))
        options = TARGET_OPTIONS[self.target]
        if self.dtype is None:
            object.__setattr__(self, "dtype", options.dtypes[0])
            object.__setattr__(self, "default_dtype", True)
        one_of("attention", self.attention, ATTENTIONS)
        one_of("dtype", self.dtype, DTYPES)
        formats = self.quantize.weight_formats() if self.quantize is not None else ()
        self._check_target("dtype", {self.dtype}, {name: row.dtypes for name, row in TARGET_OPTIONS.items()})
        self._check_target(
            "attention", {self.attention}, {name: row.attentions for name, row in TARGET_OPTIONS.items()}
        )
        self._check_target("quantize", {form.name for form in formats}, formats_of_targets())
        roles = role_names(self.quantize.roles) if self.quantize is not None else ()
        self._check_target("quantize-role", roles, {name: row.roles for name, row in TARGET_OPTIONS.items()})

    def _check_target(self, option: str, values: Collection[str], choices: Mapping[str, tuple[str, ...]]) -> None:
        """Refuse values that the target has no form for; `choices` are by target."""
        for value in sorted(set(values) - set(choices[self.target])):
            able = " or ".join(f"--target {name}" for name in choices if value in choices[name])
            raise UsageError(
                f"{option}: {value} cannot be built with --target {self.target}. Choose --{option} "
                f"{' or '.join(choices[self.target])}, or {able}."
            )

    def changed(self, **changes: Any) -> Recipe:
        """Return the recipe with other fields; a default dtype stays one, and is that of a new target."""
        return replace(self, **{**({"dtype": None} if self.default_dtype else {}), **changes})

    def with_source_dtype(self, dtype: str | None) -> Recipe:
        """Return the recipe with the dtype of a source that is an artifact, if none was given and the target has it."""
        keep = self.default_dtype and dtype in TARGET_OPTIONS[self.target].dtypes
        return self.changed(dtype=dtype) if keep else self

    def check_calibration(self, calibrated: bool) -> None:
        """Raise UsageError when there is calibration data, but no budget that it could serve."""
        if calibrated and (self.quantize is None or self.quantize.budget is None):
            raise UsageError(
                "`calibration` needs a bit budget. Pass `--quantize auto --budget BPW`, or drop `--calibrate`."
            )

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], where: str = "recipe") -> Self:
        """Make a recipe from plain options, as in a TOML file or on the command line.

        `quantize` may be a table, a format's name, or None.

        Raises:
            UsageError: An option is unknown, of the wrong type, or not among the choices.
        """
        known_options(options, set(_field_names()), where)
        values = dict(options)
        if isinstance(require := values.get("require"), list | tuple):
            values["require"] = tuple(PASSES.get(name, name) if isinstance(name, str) else name for name in require)
        quantize = values.get("quantize")
        if isinstance(quantize, str):
            values["quantize"] = QuantSpec(quantize)
        elif isinstance(quantize, Mapping):
            values["quantize"] = QuantSpec.from_mapping(quantize, where)
        elif not isinstance(quantize, QuantSpec | None):
            raise UsageError(
                f"{where}: quantize must be a table or one of {', '.join(quantize_choices())}; got {quantize!r}."
            )
        return cls(**values)

    @classmethod
    def from_toml(cls, path: Path, **overrides: Any) -> Self:
        """Read a recipe file; `overrides` win over it.

        Raises:
            UsageError: The file is missing, is not TOML, or holds an invalid option.
        """
        reachable(path, UsageError, "The recipe")
        try:
            options = tomllib.loads(read_file(path, _MAX_FILE_BYTES).decode())
        except OSError as error:
            raise UsageError(f"Recipe {path} cannot be read: {error.strerror}. Pass a TOML file.") from error
        except (ValueError, RecursionError) as error:  # also of bytes, long numbers and nesting
            raise UsageError(f"Recipe {path} is not valid TOML: {error}. Correct the file.") from error
        return cls.from_mapping({**options, **overrides}, where=str(path))

    def to_mapping(self) -> dict[str, Any]:
        """Convert to plain values: strings (also for numbers that are not whole), integers, booleans, lists, None."""
        values = {name: getattr(self, name) for name in _field_names()}
        values["quantize"] = None if self.quantize is None else self.quantize.to_mapping()
        plain: dict[str, Any] = json.loads(json.dumps(values), parse_float=str)
        return plain

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the canonical JSON of all fields."""
        text = json.dumps(self.to_mapping(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _field_names() -> tuple[str, ...]:
    """Return the names of the options of a recipe."""
    return tuple(field.name for field in fields(Recipe) if field.init)

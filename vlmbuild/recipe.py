"""What decides a build: frozen options, read from TOML, written as canonical JSON, hashed whole."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from vlmbuild.errors import UsageError

TOOLS = ("vlmbuild", "torch", "transformers", "bitsandbytes")
"""Distributions whose versions decide what a recipe's build writes."""

TARGETS = ("trainable",)
FORMATS = ("nf4", "fp4")
ATTENTIONS = ("auto", "triton", "sdpa")
DTYPES = ("float32", "bfloat16", "float16")
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)


def one_of(what: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise `UsageError` naming the choices when `value` is not among them."""
    if value not in choices or type(value) is not type(choices[0]):  # True and 64.0 are equal to integers
        listed = ", ".join(str(choice) for choice in choices)
        raise UsageError(f"{what} cannot be {value!r}. Choose one of: {listed}.")


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """4-bit quantization of the language model's linear layers in bitsandbytes' layout (QLoRA, arXiv:2305.14314, section 3).

    Attributes:
        format: "nf4" (4-bit NormalFloat) or "fp4".
        blocksize: Weights per absmax.
        double_quant: Quantize the absmax values too (8 bits, blocks of 256).
        skip: fnmatch patterns of module names that stay in `Recipe.dtype`, on top of the roles that always do.
    """

    format: Literal["nf4", "fp4"] = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of("quantize.format", self.format, FORMATS)
        if type(self.blocksize) is not int:
            raise UsageError(f"quantize.blocksize must be an integer; got {self.blocksize!r}.")
        one_of("quantize.blocksize", self.blocksize, BLOCK_SIZES)
        if not isinstance(self.double_quant, bool):
            raise UsageError(f"quantize.double_quant must be true or false; got {self.double_quant!r}.")
        object.__setattr__(self, "skip", _strings(self.skip, "quantize.skip"))


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that changes what a build writes, and nothing else.

    Attributes:
        target: What is written.
        quantize: None keeps every weight in `dtype`.
        attention: The kernel behind the attention operator; "auto" is Triton on CUDA tensors and SDPA elsewhere.
        dtype: Dtype of the stored unquantized weights and of the computation.
        require: Names of passes that must match at least once, else the build fails.
    """

    target: Literal["trainable"] = "trainable"
    quantize: QuantSpec | None = None
    attention: Literal["auto", "triton", "sdpa"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    require: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.quantize, QuantSpec | None):
            raise UsageError(f"quantize must be a QuantSpec or None; got {self.quantize!r}.")
        object.__setattr__(self, "require", _strings(self.require, "require"))
        one_of("target", self.target, TARGETS)
        one_of("attention", self.attention, ATTENTIONS)
        one_of("dtype", self.dtype, DTYPES)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], where: str = "recipe") -> Self:
        """A recipe from plain options, as a TOML file or the command line gives them.

        `quantize` may be a table, a format's name, "none" or None.

        Raises:
            UsageError: An option is unknown, of the wrong type, or not among the choices.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(options) - known):
            raise UsageError(f"{where}: unknown option {unknown[0]!r}. Known options: {', '.join(sorted(known))}.")
        values = dict(options)
        quantize = values.get("quantize")
        if isinstance(quantize, str):
            values["quantize"] = None if quantize == "none" else QuantSpec(format=quantize)  # type: ignore[arg-type]
        elif isinstance(quantize, Mapping):
            values["quantize"] = _quantization(quantize, where)
        elif not isinstance(quantize, QuantSpec | None):
            raise UsageError(
                f"{where}: quantize must be a table or one of none, {', '.join(FORMATS)}; got {quantize!r}."
            )
        return cls(**values)

    @classmethod
    def from_toml(cls, path: Path, **overrides: Any) -> Self:
        """Read a recipe file; `overrides` win over it.

        Raises:
            UsageError: The file is missing, is not TOML, or holds an invalid option.
        """
        try:
            options = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"Recipe {path} cannot be read: {error.strerror}.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"Recipe {path} is not valid TOML: {error}.") from error
        return cls.from_mapping({**options, **overrides}, where=str(path))

    def to_mapping(self) -> dict[str, Any]:
        """Plain values: strings, integers, booleans, lists, None."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON of all fields."""
        text = json.dumps(self.to_mapping(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _quantization(options: Mapping[str, Any], where: str) -> QuantSpec:
    known = {field.name for field in fields(QuantSpec)}
    if unknown := sorted(set(options) - known):
        raise UsageError(
            f"{where}: unknown option {unknown[0]!r} in [quantize]. Known options: {', '.join(sorted(known))}."
        )
    return QuantSpec(**options)


def _strings(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"{where} must be a list of strings; got {value!r}.")
    return tuple(value)

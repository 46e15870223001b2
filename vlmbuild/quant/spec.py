"""What a user may ask of quantization: a format, and for which layers it does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from vlmbuild.errors import UsageError
from vlmbuild.formats import FORMATS, WeightFormat, format_class
from vlmbuild.util.validation import number, one_of, strings

QUANTIZE_PASS = "quantize_linear"  # noqa: S105  (no password)
"""Name of the pass that applies a `QuantSpec`."""

FOUR_BIT = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
INT4_BLOCK_SIZES = (32, 64, 128, 256)
"""Those of ONNX Runtime's MatMulNBits that are block sizes here."""
QUANTIZE = ("source", "none", *FORMATS, "auto")
ROLES = ("language", "vision", "projector", "head")


@dataclass(frozen=True, slots=True)
class Override:
    """Another format for some modules, whatever their role.

    Attributes:
        pattern: fnmatch pattern of module names, "*.mlp.down_proj".
        format: "nf4", "fp4", "int8", "int4", or "none".
        blocksize, double_quant, threshold, symmetric, exact_inputs: As in `QuantSpec`.
    """

    pattern: str
    format: Literal["none", "nf4", "fp4", "int8", "int4"]
    blocksize: int = 64
    double_quant: bool = True
    threshold: float = 6.0
    symmetric: bool | None = None
    exact_inputs: bool | None = None

    def __post_init__(self) -> None:
        where = "quantize.overrides"
        if not isinstance(self.pattern, str) or not self.pattern:
            raise UsageError(f"{where}: pattern must be a string; got {self.pattern!r}.")
        one_of(f"{where}: format of {self.pattern!r}", self.format, ("none", *FORMATS))
        _check_details(self, where)

    def weight_format(self) -> WeightFormat | None:
        """The format, None for none."""
        return _weight_format(self)


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """Quantization of linear layers; which ones is decided by what they do in the model.

    Attributes:
        format: "nf4" or "fp4" (4 bits), "int8" (LLM.int8), "int4" (blocks of integers, for the target onnx), "none" (also
            dequantizes a source), "source" (as it has them, but for skips and overrides), or "auto": the layers that lose
            most keep their dtype, the others become NF4, within `budget`.
        blocksize: Weights per scale; 4 bits only.
        double_quant: Store the scales of 4-bit weights in 8 bits (blocks of 256).
        skip: fnmatch patterns of module names that keep their dtype.
        roles: Whose linear layers: "language", "vision", "projector", "head" (one with a weight of its own).
        overrides: Other formats for modules by name, whatever their role; the first pattern that matches holds.
        threshold: int8 only: columns of an input with a value above it are multiplied in 16 bits. The target
            onnx has no such columns, and rounds inputs to 8 bits in blocks of 32.
        symmetric: int4 only: False gives every block a zero point of its own; None is symmetric.
        exact_inputs: int4 only: True multiplies by the inputs' own values; else they are rounded to 8 bits in blocks, an error
            some ten times smaller than that of the weights, and a CPU takes half the time.
        budget: "auto" only: bits per weight, with scales, on average over these layers.
    """

    format: Literal["source", "none", "nf4", "fp4", "int8", "int4", "auto"] = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    skip: tuple[str, ...] = ()
    roles: tuple[str, ...] = ("language",)
    overrides: tuple[Override, ...] = ()
    threshold: float = 6.0
    budget: float | None = None
    symmetric: bool | None = None
    exact_inputs: bool | None = None

    def __post_init__(self) -> None:
        one_of("quantize.format", self.format, QUANTIZE)
        _check_details(self, "quantize")
        object.__setattr__(self, "skip", strings(self.skip, "quantize.skip"))
        object.__setattr__(self, "roles", strings(self.roles, "quantize.roles"))
        for role in self.roles:
            one_of("quantize.roles", role, ROLES)
        object.__setattr__(self, "overrides", _overrides(self.overrides))
        if self.budget is not None:
            object.__setattr__(self, "budget", _budget(self.budget))
        thresholds = {item.threshold for item in self.overrides if item.format == "int8"}
        thresholds |= {self.threshold} if self.format == "int8" else set()
        if len(thresholds) > 1:
            raise UsageError(
                "quantize: all int8 layers have one threshold; config.json, and so transformers, knows no more."
            )
        if (self.format == "auto") != (self.budget is not None):
            raise UsageError(
                "quantize: a budget of bits per weight goes with the format auto, and auto needs one, for example 5.0."
            )

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], where: str) -> Self:
        """From the plain values of a table. Raises UsageError for an unknown option, or one that is not valid."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(options) - known):
            raise UsageError(
                f"{where}: unknown option {unknown[0]!r} in [quantize]. Known options: {', '.join(sorted(known))}."
            )
        return cls(**options)

    def formats(self) -> frozenset[str]:
        """All that layers may get."""
        return frozenset({self.format, *(item.format for item in self.overrides)})

    def weight_format(self) -> WeightFormat | None:
        """The format of the layers that are quantized; "auto" quantizes to NF4, "none" and "source" add nothing."""
        return _weight_format(self)


def _weight_format(spec: QuantSpec | Override) -> WeightFormat | None:
    if spec.format in ("none", "source"):
        return None
    form = format_class("nf4" if spec.format == "auto" else spec.format)
    options = {field.name: getattr(spec, field.name) for field in fields(form)}  # type: ignore[arg-type]
    return form(**{name: value for name, value in options.items() if value is not None})


def _check_details(spec: QuantSpec | Override, where: str) -> None:
    if type(spec.blocksize) is not int:
        raise UsageError(f"{where}.blocksize must be an integer; got {spec.blocksize!r}.")
    one_of(f"{where}.blocksize", spec.blocksize, BLOCK_SIZES)
    if not isinstance(spec.double_quant, bool):
        raise UsageError(f"{where}.double_quant must be true or false; got {spec.double_quant!r}.")
    if spec.format == "int4":
        one_of(f"{where}.blocksize of int4", spec.blocksize, INT4_BLOCK_SIZES)
    for name in ("symmetric", "exact_inputs"):
        value = getattr(spec, name)
        if spec.format != "int4" and value is not None:
            raise UsageError(f"{where}.{name} is for int4; {spec.format} has no such choice. Leave it out.")
        if not isinstance(value, bool | None):
            raise UsageError(f"{where}.{name} must be true or false; got {value!r}.")
    threshold = number(spec.threshold, f"{where}.threshold")
    if threshold < 0:
        raise UsageError(f"{where}.threshold must not be negative; got {spec.threshold!r}.")
    object.__setattr__(spec, "threshold", threshold)


def _budget(value: object) -> float:
    text = value.removesuffix("bpw").strip() if isinstance(value, str) else value
    budget = number(text, "quantize.budget")
    if not 4 < budget <= 32:
        raise UsageError(f"quantize.budget must be above 4 and at most 32 bits per weight; got {value!r}.")
    return budget


def _overrides(values: object) -> tuple[Override, ...]:
    if not isinstance(values, list | tuple):
        raise UsageError(f"quantize.overrides must be a list of tables; got {values!r}.")
    return tuple(_override(value) for value in values)


def _override(value: object) -> Override:
    if isinstance(value, Override):
        return value
    known = {field.name for field in fields(Override)}
    if not isinstance(value, Mapping) or not {"pattern", "format"} <= set(value) <= known:
        raise UsageError(
            f"quantize.overrides: {value!r} is not a table with pattern and format, and perhaps "
            "blocksize, double_quant, threshold, symmetric, exact_inputs."
        )
    return Override(**value)

"""Quantization of a build: a format, and modules that differ from it. Options are checked here and in the formats."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any, Final, Literal, Self

from vlmbuild.errors import UsageError
from vlmbuild.formats import FORMATS, WeightFormat, format_class
from vlmbuild.util.validation import known_options, number, one_of, strings

QUANTIZE_PASS: Final = "quantize_linear"  # noqa: S105  (no password)
"""Name of the pass that applies a `QuantSpec`."""

ROLES: Final = ("language", "vision", "projector", "embedding", "head")
AUTO_BASE: Final = "nf4"
"""Format of the layers that a budget quantizes."""
ROUNDED_BEFORE: Final = "rounded before, to "
"""Beginning of a decision's reason where the source is quantized in a format that the target does not keep."""
_STORED: Final = {"blocksize": 64, "double_quant": True, "threshold": 6.0, "symmetric": None, "exact_inputs": None}
"""Options that every stored spec has, whatever its format, with the value of formats that lack them."""


@dataclass(frozen=True, slots=True)
class Auto:
    """Formats by measurement: layers that lose most keep their dtype, the others get `base`.

    Attributes:
        budget: Bits per weight, with scales, on average over these layers.
        base: Format of the others.
    """

    budget: float
    base: WeightFormat


Choice = WeightFormat | Auto | Literal["source", "none"]


class _Chosen:
    """Base of what has a choice."""

    __slots__ = ()
    choice: Choice

    @property
    def format(self) -> str:
        """Name of the format, "source", "none" or "auto"."""
        if isinstance(self.choice, str):
            return self.choice
        return "auto" if isinstance(self.choice, Auto) else self.choice.name

    def weight_format(self) -> WeightFormat | None:
        """Return the format of the layers that are quantized; None for "none" and "source"."""
        if isinstance(self.choice, str):
            return None
        return self.choice.base if isinstance(self.choice, Auto) else self.choice

    def _stored_options(self) -> dict[str, Any]:
        """Return the options as stored specs have them: a default is written as in the specs of other formats."""
        form, stored = self.weight_format(), dict[str, Any](_STORED)
        for field in _fields(type(form)) if form is not None else ():
            value = getattr(form, field.name)
            if value != field.default or field.name not in _STORED:
                stored[field.name] = value
        return stored


@dataclass(frozen=True, slots=True, init=False)
class Override(_Chosen):
    """Another format for some modules, whatever their role.

    Attributes:
        pattern: fnmatch pattern of module names, "*.mlp.down_proj".
        choice: The format, or "none".
    """

    pattern: str
    choice: WeightFormat | Literal["none"]

    def __init__(self, pattern: str, format: str, **options: Any) -> None:
        """
        Args:
            pattern: fnmatch pattern of module names.
            format: "none" or a format's name.
            options: Options of the format, as in `QuantSpec`.
        """
        where = "quantize.overrides"
        if not isinstance(pattern, str) or not pattern:
            raise UsageError(f"{where}: pattern must be a string; got {pattern!r}.")
        one_of(f"{where}: format of {pattern!r}", format, ("none", *FORMATS))
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "choice", _format(where, format, options) or "none")

    def to_mapping(self) -> dict[str, Any]:
        """Convert to plain values."""
        return {"pattern": self.pattern, "format": self.format, **self._stored_options()}


@dataclass(frozen=True, slots=True, init=False)
class QuantSpec(_Chosen):
    """Quantization of linear layers, which are selected by their role in the model.

    Attributes:
        choice: A format; `Auto`; "source" keeps what the source has, apart from skips and overrides; "none" dequantizes.
        skip: fnmatch patterns of module names that keep their dtype.
        roles: Roles of the layers to quantize: "language", "vision", "projector", "head", and for the target onnx "embedding";
            or with a format of their own, "vision=int8". The weight of a head that is tied to the embeddings needs both
            roles in one format. Default "language"; int4 also has 8 bits for every other role.
        overrides: Other formats for modules by name, whatever their role; the first pattern that matches holds.
    """

    choice: Choice
    skip: tuple[str, ...]
    roles: tuple[str, ...]
    overrides: tuple[Override, ...]

    def __init__(
        self,
        format: str = "nf4",
        *,
        skip: tuple[str, ...] = (),
        roles: tuple[str, ...] | None = None,
        overrides: tuple[Override, ...] = (),
        budget: float | str | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            format: "nf4" or "fp4" (4 bits), "int8" (LLM.int8), "int4" (blocks of integers, for the target onnx), "q8_0",
                "q5_1", "q5_0", "q4_1" or "q4_0" (for the target gguf), "none",
                "source", or "auto".
            skip: See the attribute.
            roles: See the attribute.
            overrides: See the attribute; each an `Override` or a table with its arguments.
            budget: "auto" only: bits per weight, as a number or like "5.0bpw".
            options: Options of the format:
                blocksize: nf4, fp4, int4, auto: weights per scale, default 64.
                double_quant: nf4, fp4, auto: store scales in 8 bits (blocks of 256), default True.
                threshold: int8: columns of an input with a value above it are multiplied in 16 bits, default 6.0. The
                    target onnx has no such columns, and rounds inputs to 8 bits in blocks of 32.
                group_size: w4a16: weights of a row that share a scale, default 128; 64 or 32 in layers whose rows are no
                    multiple.
                symmetric: int4: False gives every block a zero point of its own, default True.
                exact_inputs: int4: True multiplies by the inputs' own values. By default they are rounded to 8 bits in
                    blocks, an error some ten times smaller than that of the weights, and a CPU takes half the time.

        Raises:
            UsageError: An option is unknown, not the format's, or not valid.
        """
        where = "quantize"
        one_of(f"{where}.format", format, quantize_choices())
        if (format == "auto") != (budget is not None):
            raise UsageError(
                "quantize: a budget of bits per weight goes with the format auto, and auto needs one. Add budget = 5.0, or "
                "choose another format."
            )
        choice: Choice = "none" if format == "none" else "source"
        form = _format(where, AUTO_BASE if format == "auto" else format, options)
        if form is not None:
            choice = form if budget is None else Auto(_budget(budget), form)
        object.__setattr__(self, "choice", choice)
        object.__setattr__(self, "skip", strings(skip, "quantize.skip"))
        object.__setattr__(self, "roles", _default_roles(form) if roles is None else _roles(roles))
        object.__setattr__(self, "overrides", _overrides(overrides))
        _check_shared(self.weight_formats())

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], where: str) -> Self:
        """Convert from a table. Raises UsageError for an unknown option, or one that is not valid."""
        known_options(options, option_types(), where, " in [quantize]")
        return cls(**options)

    def changed(self, **changes: Any) -> QuantSpec:
        """Return the spec with other arguments; a new format keeps the options that it has too."""
        names = {"format", "skip", "overrides", *option_names(changes.get("format", self.format))}
        if self.roles != _default_roles(self.weight_format()):  # another format has its own default
            names.add("roles")
        return QuantSpec(**{**{k: v for k, v in self.to_mapping().items() if k in names}, **changes})

    @property
    def budget(self) -> float | None:
        """Bits per weight; None without a budget."""
        return self.choice.budget if isinstance(self.choice, Auto) else None

    def weight_formats(self) -> tuple[WeightFormat, ...]:
        """Return all formats that layers may get."""
        roles = [] if self.weight_format() is None else [self.role_format(role) for role in role_names(self.roles)]
        every = [self.weight_format(), *(item.weight_format() for item in self.overrides), *roles]
        return tuple(form for form in every if form is not None)

    def role_format(self, role: str) -> WeightFormat | None:
        """Return the format of a role's layers; None if they keep their dtype, and for "none" and "source"."""
        form = self.weight_format()
        if form is None or role in self.roles:
            return form
        name = next((entry.partition("=")[2] for entry in self.roles if entry.startswith(f"{role}=")), "")
        if name in ("", form.name):
            return form if name else None
        alike = (item.weight_format() for item in self.overrides)  # options that all layers share are written once
        return (
            next((item for item in alike if item and item.name == name and item.shared), None) or format_class(name)()
        )

    def to_mapping(self) -> dict[str, Any]:
        """Convert to plain values, the inverse of `from_mapping`."""
        return {
            "format": self.format,
            "skip": list(self.skip),
            "roles": list(self.roles),
            "overrides": [item.to_mapping() for item in self.overrides],
            "budget": self.budget,
            **self._stored_options(),
        }


def role_names(roles: tuple[str, ...]) -> tuple[str, ...]:
    """Return the roles of the entries of `QuantSpec.roles`."""
    return tuple(entry.partition("=")[0] for entry in roles)


def quantize_choices() -> tuple[str, ...]:
    """Return the values of `QuantSpec.format`."""
    return ("source", "none", *FORMATS, "auto")


def option_types() -> dict[str, Any]:
    """Return the type of each argument of `QuantSpec`, the options of all formats included."""
    own = {field.name: type(field.default) for name in FORMATS for field in _fields(format_class(name))}
    lists = dict.fromkeys(("skip", "roles", "overrides"), tuple[str, ...])
    return {"format": str, **own, **lists, "budget": str}


def option_names(format: str) -> frozenset[str]:
    """Return the names of the options that go with a choice of `quantize_choices`."""
    if format in ("source", "none"):
        return frozenset()
    names = {field.name for field in _fields(format_class(AUTO_BASE if format == "auto" else format))}
    return frozenset(names | {"budget"} if format == "auto" else names)


def _format(where: str, name: str, options: Mapping[str, Any]) -> WeightFormat | None:
    """Make a format from options; options of other formats may only have the value that stored specs give them."""
    names = option_names(name)
    for key, value in options.items():
        if key not in names and value is not None and value not in (_STORED.get(key), str(_STORED.get(key))):
            own = f"its options are {', '.join(sorted(names))}" if names else "it has none"
            raise UsageError(f"{where}.{key} is not an option of {name}; {own}. Leave it out.")
    if not names and name not in FORMATS:
        return None
    try:
        return format_class(name)(**{key: options[key] for key in names if options.get(key) is not None})
    except UsageError as error:
        raise UsageError(f"{where}.{error}") from None


def _fields(form: type[WeightFormat]) -> tuple[Field[Any], ...]:
    return fields(form)  # type: ignore[arg-type]  # every format is a dataclass


def _default_roles(form: WeightFormat | None) -> tuple[str, ...]:
    return ("language",) if form is None else form.default_roles


def _roles(values: object) -> tuple[str, ...]:
    """Check entries ROLE and ROLE=FORMAT."""
    entries = strings(values, "quantize.roles")
    names = role_names(entries)
    for entry, name in zip(entries, names, strict=True):
        one_of("quantize.roles", name, ROLES)
        if "=" in entry:
            one_of(f"quantize.roles: format of {name!r}", entry.partition("=")[2], tuple(FORMATS))
        if len({other for other in entries if other.partition("=")[0] == name}) > 1:
            raise UsageError(f"quantize.roles: {name} has two formats. Name it once, as {name} or {name}=FORMAT.")
    return entries


def _check_shared(formats: tuple[WeightFormat, ...]) -> None:
    values = defaultdict(set)
    for form in formats:
        for option in form.shared:
            values[form.name, option].add(getattr(form, option))
    for (name, option), different in values.items():
        if len(different) > 1:
            raise UsageError(
                f"quantize: all {name} layers have one {option}, since config.json, and so transformers, knows no more. "
                f"Choose one of {', '.join(map(str, sorted(different)))}."
            )


def _budget(value: object) -> float:
    text = value.removesuffix("bpw").strip() if isinstance(value, str) else value
    budget = number(text, "quantize.budget")
    if not 4 < budget <= 32:
        raise UsageError(f"quantize.budget must be above 4 and at most 32 bits per weight; got {value!r}.")
    return budget


def _overrides(values: object) -> tuple[Override, ...]:
    if not isinstance(values, list | tuple):
        raise UsageError(f"quantize.overrides must be a list of tables; got {values!r}.")
    for value in values:
        if not isinstance(value, Override) and not (isinstance(value, Mapping) and {"pattern", "format"} <= set(value)):
            raise UsageError(
                f"quantize.overrides: {value!r} is not a table with pattern and format. Add them, and perhaps options of the "
                "format."
            )
    return tuple(value if isinstance(value, Override) else Override(**value) for value in values)

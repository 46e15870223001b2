"""Sizes that change from batch to batch, as polynomials of named dimensions: "4*merged", "batch*new", "past + new"."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # sizes are read where torch is not
    import torch

_NAME = re.compile(r"[A-Za-z_]\w*\b(?!\()")
_LARGEST_POWER = 9
_EVERYDAY_SIZES = {"samples": 2, "segments": 4, "groups": 4}
_EVERYDAY = 1024
"""Tokens, patches: whatever is counted by the thousand."""
EVERYDAY = f"at {_EVERYDAY} tokens and merged patches"
"""The sizes of `everyday_value` in words."""

Term = tuple[int, tuple[str, ...]]
"""A coefficient and the names that it multiplies; a power repeats its name."""


@dataclass(frozen=True, slots=True, eq=False)
class Dim:
    """A sum of products of names with integer coefficients. It prints as it was written and compares without regard to order.

    A factor that is no polynomial, such as "(rows//2)", is kept as one opaque name: it prints, but cannot be evaluated.

    Attributes:
        terms: Terms in the order of printing. No two have the same names, and no coefficient is zero.
    """

    terms: tuple[Term, ...]

    @classmethod
    def parse(cls, text: str) -> Dim:
        """Read a printed size.

        Raises:
            ValueError: The text is not a sum of products.
        """
        try:
            return _parse(ast.parse(text, mode="eval").body, text)
        except (SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(f"{text!r} is not a sum of products of names and whole numbers") from error

    @classmethod
    def named(cls, name: str) -> Dim:
        """Take a name as it is."""
        return cls(((1, (name,)),))

    @classmethod
    def of(cls, size: int | torch.SymInt, names: Mapping[str, str]) -> Dim:
        """Convert the size of a traced tensor, with names for its symbols."""
        return cls.parse(size_text(size, names))

    def __str__(self) -> str:
        text = ""
        for coefficient, names in self.terms:
            minus = coefficient < 0
            text += (" - " if minus else " + ") if text else "-" * minus
            powers = [(name, len(list(same))) for name, same in groupby(names)]
            factors = [name if power == 1 else f"{name}**{power}" for name, power in powers]
            number = [str(abs(coefficient))] if abs(coefficient) != 1 or not factors else []
            text += "*".join(number + factors)
        return text or "0"

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Dim) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __add__(self, other: Size) -> Dim:
        return Dim(_collect((*self.terms, *_terms(other))))

    def __mul__(self, other: Size) -> Dim:
        return Dim(_collect((a * b, (*x, *y)) for a, x in self.terms for b, y in _terms(other)))

    __radd__ = __add__
    __rmul__ = __mul__

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, in the order of printing."""
        factors = (factor for _, names in self.terms for factor in names)
        return tuple(dict.fromkeys(name for factor in factors for name in _NAME.findall(factor)))

    def substitute(self, sizes: Mapping[str, Size]) -> Size:
        """Replace names by sizes; returns an integer if no name is left."""
        total = Dim(())
        for coefficient, names in self.terms:
            product = Dim(((coefficient, ()),))
            for name in names:
                product *= sizes.get(name, Dim.named(name))
            total += product
        return total if total.names else sum(coefficient for coefficient, _ in total.terms)

    def evaluate(self, values: Mapping[str, Any]) -> Any:
        """Compute the value from that of each name: numbers, or symbols of torch.

        Raises:
            KeyError: A name has no value.
        """
        total: Any = 0
        for index, (coefficient, names) in enumerate(self.terms):
            product: Any = None if coefficient == 1 and names else coefficient  # torch.export.Dim takes no factor of 1
            for name in names:
                product = values[name] if product is None else product * values[name]
            total = total + product if index else product
        return total

    def ordered(self) -> Dim:
        """Sort factors by name, and terms with the highest powers first."""
        terms = [(coefficient, tuple(sorted(names))) for coefficient, names in self.terms]
        return Dim(tuple(sorted(terms, key=lambda term: (-len(term[1]), str(Dim((term,)))))))

    def _key(self) -> frozenset[Term]:
        return frozenset((coefficient, tuple(sorted(names))) for coefficient, names in self.terms)


Size = int | Dim
Shape = tuple[Size, ...]


def parse_shape(sizes: Iterable[int | str | Dim]) -> Shape:
    """Parse a shape whose changing sizes may be texts: ("4*merged", 8)."""
    return tuple(Dim.parse(size) if isinstance(size, str) else size for size in sizes)


def shape_json(shape: Shape) -> list[int | str]:
    """Return a shape as plain values, which `parse_shape` reads."""
    return [size if isinstance(size, int) else str(size) for size in shape]


def shape_names(shapes: Iterable[Shape]) -> tuple[str, ...]:
    """Return every name in shapes, in the order of their first use."""
    sizes = (size for shape in shapes for size in shape)
    return tuple(dict.fromkeys(name for size in sizes if isinstance(size, Dim) for name in size.names))


def evaluate_shape(shape: Shape, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Compute each size from the value of each name.

    Raises:
        KeyError: A name has no value.
    """
    return tuple(size.evaluate(values) if isinstance(size, Dim) else size for size in shape)


def size_text(size: int | torch.SymInt, names: Mapping[str, str]) -> str:
    """Print the size of a traced tensor, with names for its symbols."""
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(size))


def growth(before: str, after: str) -> float | None:
    """Return (after - before) / before at everyday sizes; None if a formula cannot be read or there was nothing before."""
    old, new = everyday_value(before), everyday_value(after)
    return (new - old) / old if old and new is not None else None


def everyday_value(formula: str) -> int | None:
    """Evaluate a formula at everyday sizes; None if it is not a sum of products."""
    try:
        size = Dim.parse(formula)
        return int(size.evaluate({name: _EVERYDAY_SIZES.get(name, _EVERYDAY) for name in size.names}))
    except (ValueError, KeyError):  # no sum of products, or an opaque factor
        return None


def _terms(size: Size) -> tuple[Term, ...]:
    return size.terms if isinstance(size, Dim) else ((size, ()),)


def _collect(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Add up terms with the same names, at the place of the first."""
    sums: dict[tuple[str, ...], Term] = {}
    for coefficient, names in terms:
        key = tuple(sorted(names))
        before, names = sums.get(key, (0, names))
        sums[key] = (before + coefficient, names)
    return tuple(term for term in sums.values() if term[0])


def _parse(node: ast.expr, text: str) -> Dim:
    match node:
        case ast.Constant(value=int(number)):
            return Dim(((number, ()),)) if number else Dim(())
        case ast.Name(name):
            return Dim.named(name)
        case ast.UnaryOp(ast.USub(), operand):
            return _parse(operand, text) * -1
        case ast.BinOp(left, ast.Add(), right):
            return _parse(left, text) + _parse(right, text)
        case ast.BinOp(left, ast.Sub(), right):
            return _parse(left, text) + _parse(right, text) * -1
        case ast.BinOp(left, ast.Mult(), right):
            return _parse(left, text) * _parse(right, text)
        case ast.BinOp(left, ast.Pow(), ast.Constant(value=int(power))) if power <= _LARGEST_POWER:
            return math.prod([_parse(left, text)] * power, start=Dim(((1, ()),)))
        case ast.BinOp(_, ast.FloorDiv() | ast.Mod(), _):
            return Dim.named(f"({ast.get_source_segment(text, node)})")
        case ast.Call():
            return Dim.named(str(ast.get_source_segment(text, node)))
    raise ValueError(f"{text!r} is not a sum of products of names and whole numbers")

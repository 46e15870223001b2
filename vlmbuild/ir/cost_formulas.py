"""Cost formulas read back: how much one exceeds another at everyday sizes. Only numbers and powers are evaluated."""

from __future__ import annotations

import re
from fractions import Fraction

_SIZES = {"samples": 2, "segments": 4, "groups": 4}
_OTHERS = 1024
"""Tokens, patches: whatever is counted by the thousand."""

EVERYDAY = f"at {_OTHERS} tokens and merged patches"
"""The sizes in words."""

_TERM = re.compile(r"-?\d+|[A-Za-z_]\w*(\*\*\d+)?")


def growth(before: str, after: str) -> float | None:
    """(after - before) / before at everyday sizes; None where a formula cannot be read, or there was nothing before."""
    values = [evaluate(formula) for formula in (before, after)]
    if values[0] is None or values[1] is None or values[0] == 0:
        return None
    return float((values[1] - values[0]) / values[0])


def evaluate(formula: str) -> Fraction | None:
    """A sum of products of numbers and powers of names; None for anything else."""
    total = Fraction(0)
    for term in formula.split(" + "):
        product = Fraction(1)
        for factor in re.split(r"(?<!\*)\*(?!\*)", term):
            if not _TERM.fullmatch(factor):
                return None
            product *= _factor(factor)
        total += product
    return total


def _factor(text: str) -> Fraction:
    if text.lstrip("-").isdigit():
        return Fraction(int(text))
    name, _, power = text.partition("**")
    return Fraction(_SIZES.get(name, _OTHERS)) ** int(power or 1)

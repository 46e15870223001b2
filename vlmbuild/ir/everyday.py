"""Formulas of cost at everyday sizes, to compare them as numbers."""

from __future__ import annotations

from vlmbuild.ir.dims import Dim

_SIZES = {"samples": 2, "segments": 4, "groups": 4}
_OTHERS = 1024
"""Tokens, patches: whatever is counted by the thousand."""

EVERYDAY = f"at {_OTHERS} tokens and merged patches"
"""The sizes of `everyday_value` in words."""


def growth(before: str, after: str) -> float | None:
    """Return (after - before) / before at everyday sizes; None if a formula cannot be read or there was nothing before."""
    old, new = everyday_value(before), everyday_value(after)
    return (new - old) / old if old and new is not None else None


def everyday_value(formula: str) -> int | None:
    """Evaluate a formula at everyday sizes; None if it is not a sum of products."""
    try:
        size = Dim.parse(formula)
        return int(size.evaluate({name: _SIZES.get(name, _OTHERS) for name in size.names}))
    except (ValueError, KeyError):  # no sum of products, or an opaque factor
        return None

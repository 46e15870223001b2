"""Checks of options and weights that users supply, with messages that name the choices."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from vlmbuild.errors import SourceError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


def one_of(where: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise `UsageError` naming the choices when `value` is not among them."""
    if value not in choices or type(value) is not type(choices[0]):  # True and 64.0 are equal to integers
        listed = ", ".join(str(choice) for choice in choices)
        raise UsageError(f"{where} cannot be {value!r}. Choose one of: {listed}.")


def known_options(options: Collection[str], known: Collection[str], where: str, table: str = "") -> None:
    """Raise `UsageError` naming the known options when one of `options` is not among them."""
    if unknown := sorted(set(options) - set(known)):
        raise UsageError(f"{where}: unknown option {unknown[0]!r}{table}. Known options: {', '.join(sorted(known))}.")


def boolean(where: str, value: object) -> None:
    """Raise `UsageError` when `value` is not a bool."""
    if not isinstance(value, bool):
        raise UsageError(f"{where} must be true or false; got {value!r}.")


def strings(value: object, where: str) -> tuple[str, ...]:
    """Return a list of strings as a tuple. Raises UsageError for anything else."""
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"{where} must be a list of strings; got {value!r}.")
    return tuple(value)


def number(value: object, where: str) -> float:
    """Return a finite number, also from text, the form of manifests. Raises UsageError for anything else."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        parsed = float(value)
        if not math.isfinite(parsed):
            raise ValueError
    except ValueError:
        raise UsageError(f"{where} must be a number; got {value!r}.") from None
    return parsed


def require_finite(
    values: Tensor, name: str, remedy: str = "Repair the checkpoint, or add it to the skip list."
) -> None:
    """Raise SourceError with `name` and `remedy` for a tensor that holds NaN or infinity."""
    if not values.isfinite().all():
        raise SourceError(f"{name} holds NaN or infinity. {remedy}")

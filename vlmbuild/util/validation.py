"""Checks of options that users give, with messages that name the choices."""

from __future__ import annotations

import math

from vlmbuild.errors import UsageError


def one_of(what: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise `UsageError` naming the choices when `value` is not among them."""
    if value not in choices or type(value) is not type(choices[0]):  # True and 64.0 are equal to integers
        listed = ", ".join(str(choice) for choice in choices)
        raise UsageError(f"{what} cannot be {value!r}. Choose one of: {listed}.")


def strings(value: object, where: str) -> tuple[str, ...]:
    """A list of strings as a tuple. Raises UsageError for anything else."""
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"{where} must be a list of strings; got {value!r}.")
    return tuple(value)


def number(value: object, where: str) -> float:
    """A finite number, also as text, which is how manifests hold one. Raises UsageError for anything else."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        found = float(value)
        if not math.isfinite(found):
            raise ValueError
    except ValueError:
        raise UsageError(f"{where} must be a number; got {value!r}.") from None
    return found

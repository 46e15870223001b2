"""Checks of options and weights that users supply, with messages that name the choices."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from vlmbuild.errors import SourceError, UsageError, VlmbuildError

if TYPE_CHECKING:
    import torch
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


def reachable(path: str | Path, kind: type[VlmbuildError], what: str) -> Path:
    """Return a path that the system can look up, whether something is there or not. Raises `kind` for any other."""
    try:
        if not str(path):
            raise ValueError("it is empty")
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        shown = str(path) if len(str(path)) < 200 else f"{str(path)[:200]}..."
        raise kind(
            f"{what} {shown!r} cannot be looked up: {reason}. Check its spelling, its length, and the permissions of the "
            "folders above it."
        ) from error
    return Path(path)


def is_finite(values: Tensor) -> bool:
    """Return whether floats hold neither NaN nor infinity."""
    # One pass that hands NaN on; `isfinite` takes 10 to 20 times as long on a CPU.
    return not values.numel() or all(math.isfinite(end) for end in values.aminmax())


def cast_finite(
    values: Tensor,
    dtype: torch.dtype,
    name: str,
    dtypes: Collection[str],
    kind: type[VlmbuildError] = SourceError,
) -> Tensor:
    """Cast floats to a dtype that holds them all.

    Args:
        values: Floats.
        dtype: Dtype of the result.
        name: Name for messages.
        dtypes: Names of dtypes that the user may choose.
        kind: Error for values beyond the range.

    Raises:
        SourceError: Values are NaN or infinite, or beyond the range of the dtype.
    """
    import torch

    cast = values.to(dtype)
    if not is_finite(cast):
        require_finite(values, f"The tensor {name}", "Repair the checkpoint.")
        largest = float(values.abs().max())
        wide = [other for other in dtypes if torch.finfo(getattr(torch, other)).max >= largest]
        raise kind(
            f"The tensor {name} holds values up to ±{largest:g}, beyond ±{torch.finfo(dtype).max:g}, the range of "
            f"{str(dtype).removeprefix('torch.')}. Pass --dtype {' or '.join(wide)}."
        )
    return cast


def require_finite(
    values: Tensor, name: str, remedy: str = "Repair the checkpoint, or add it to the skip list."
) -> None:
    """Raise SourceError with `name` and `remedy` for a tensor that holds NaN or infinity."""
    if not is_finite(values):
        raise SourceError(f"{name} holds NaN or infinity. {remedy}")

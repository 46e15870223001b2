"""Canonical JSON: one byte form for every value, so that a hash of it means something."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vlmbuild.errors import IntegrityError

MAX_BYTES: Final = 16 * 2**20
MAX_DEPTH: Final = 32


def canonical_json(value: object) -> bytes:
    """Encode a JSON value in its only byte form: UTF-8, sorted keys, no spaces, a final newline.

    Raises TypeError naming the place of a float, a key that is not a string, or any other type, and ValueError for
    text that is not Unicode, an integer outside 64 bits, or nesting deeper than 32.
    """
    check_json(value, "value", 0)
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=_as_dict)
    return text.encode() + b"\n"


def _as_dict(value: object) -> dict[str, Any]:
    assert isinstance(value, Mapping)  # check_json let nothing else through
    return dict(value)


def check_json(value: object, where: str, depth: int) -> None:
    """Raise TypeError or ValueError, naming the place inside `where`, for what canonical JSON does not have."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{where} is nested deeper than {MAX_DEPTH} levels; flatten it")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; only strings can be keys")
            _check_scalar(key, f"a key of {where}")
            check_json(item, f"{where}.{key}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]", depth + 1)
    else:
        _check_scalar(value, where)


def _check_scalar(value: object, where: str) -> None:
    if isinstance(value, str):
        if not is_text(value):
            raise ValueError(f"{where} holds a lone surrogate; pass valid Unicode text")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{where} does not fit into 64 bits; write it as a string")
    elif value is not None:
        # Two writers can print one float in two ways, so a hash over floats would not be reproducible.
        raise TypeError(f"{where} is a {type(value).__name__}; canonical JSON has no such value, write it as a string")


def is_text(value: str) -> bool:
    """Return whether a string can be encoded: JSON can spell half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def parse_canonical(data: bytes, *, where: str = "manifest.json") -> Any:
    """Parse bytes that canonical_json could have written, and nothing else.

    Raises IntegrityError for more than 16 MiB, anything that is not UTF-8 JSON, duplicate keys, floats, deep nesting,
    lone surrogates, and any other difference from the canonical form.
    """
    if len(data) > MAX_BYTES:
        raise _not_canonical(where, f"it is larger than {MAX_BYTES} bytes")
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=unique_keys, parse_float=_reject_number, parse_constant=_reject_number
        )
        again = canonical_json(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise _not_canonical(where, str(error) or type(error).__name__) from error
    if again != data:
        raise _not_canonical(where, "its bytes differ from the canonical form of what they say")
    return value


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict as `object_pairs_hook` of JSON; raises ValueError for a key that comes twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} comes twice")
    return result


def _reject_number(text: str) -> None:
    raise ValueError(f"the number {text} is not an integer")


def _not_canonical(where: str, reason: str) -> IntegrityError:
    return IntegrityError(f"{where} is not canonical JSON: {reason}. Build the artifact again or copy it again.")

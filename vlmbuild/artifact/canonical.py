"""Canonical JSON: one byte form for every value, so that a hash of it means something."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from vlmbuild.errors import IntegrityError

MAX_BYTES: Final = 16 * 2**20
MAX_DEPTH: Final = 32


def canonical_json(value: object) -> bytes:
    """Encode a JSON value in its only byte form: UTF-8, sorted keys, no spaces, a final newline.

    Raises TypeError naming the place of a float, a key that is not a string, or any other type, and ValueError for
    text that is not Unicode, an integer outside 64 bits, or nesting deeper than 32.
    """
    text = json.dumps(plain_json(value), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode() + b"\n"


def plain_json(value: object, where: str = "value", depth: int = 0) -> Any:
    """Copy a value into dicts, lists and scalars. Raises the errors of `canonical_json`, naming the place inside `where`."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{where} is nested deeper than {MAX_DEPTH} levels; flatten it")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; only strings can be keys")
            plain_json(key, f"a key of {where}", depth)
        return {key: plain_json(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, str) and not is_text(value):
        raise ValueError(f"{where} holds a lone surrogate; pass valid Unicode text")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where} does not fit into 64 bits; write it as a string")
    if value is not None and not isinstance(value, (str, int)):
        # Two writers can print one float in two ways, so a hash over floats would not be reproducible.
        raise TypeError(f"{where} is a {type(value).__name__}; canonical JSON has no such value, write it as a string")
    return value


def is_text(value: str) -> bool:
    """Return whether a string can be encoded: JSON can spell half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def parse_canonical(data: bytes, *, where: str = "manifest.json") -> Any:
    """Parse bytes that canonical_json could have written, and nothing else.

    Raises IntegrityError for more than 16 MiB, anything that is not UTF-8 JSON, duplicate keys, floats, deep nesting,
    lone surrogates, and any other difference from the canonical form.
    """
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        value = json.loads(
            data.decode(), object_pairs_hook=unique_keys, parse_float=_reject_number, parse_constant=_reject_number
        )
        if canonical_json(value) != data:
            raise ValueError("its bytes differ from the canonical form of what they say")
    except (ValueError, TypeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise IntegrityError(
            f"{where} is not canonical JSON: {reason}. Build the artifact again or copy it again."
        ) from error
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict as `object_pairs_hook` of JSON; raises ValueError for a key that comes twice."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} comes twice")
        result[key] = value
    return result


def _reject_number(text: str) -> None:
    raise ValueError(f"the number {text} is not an integer")

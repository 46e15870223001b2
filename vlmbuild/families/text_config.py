"""Language models that can be captured, judged from their config."""

from __future__ import annotations

from typing import Any

from vlmbuild.errors import SourceError

STATIC_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
"""Types whose frequencies do not depend on the data."""


def check_text(text: Any) -> None:
    """Raise SourceError for language models that would be captured wrongly."""
    rope_type = text.rope_parameters["rope_type"]
    if rope_type not in STATIC_ROPE_TYPES:
        raise SourceError(
            f"config.json: rope_type {rope_type!r} depends on the data and cannot be compiled. "
            f"Use one of {', '.join(STATIC_ROPE_TYPES)}."
        )
    dropout = getattr(text, "attention_dropout", 0) or getattr(text, "dropout", 0)
    if dropout:
        raise SourceError(
            f"config.json: attention dropout {dropout} is not supported. Set it to 0, as published configs do."
        )

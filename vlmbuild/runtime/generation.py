"""Checks of the inputs of `model(...)` and `generate(...)`, and of the cache that generation continues from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vlmbuild.errors import UsageError
from vlmbuild.families import Family
from vlmbuild.runtime.key_value_cache import KeyValueCache

_ALWAYS_ALLOWED = {
    "return_dict",
    "use_cache",
    "position_ids",
    "inputs_embeds",
    "past_key_values",
    "logits_to_keep",
}
"""Arguments that callers of transformers' models pass by habit, and that `prepare` refuses with its own reason."""


def check_names(family: Family, caller: str, arguments: Mapping[str, Any]) -> None:
    """Refuse misspelled names, which would be ignored.

    Raises:
        UsageError: A name is unknown.
    """
    known = {"input_ids", "attention_mask", *family.input_layout}
    present = {name for name, value in arguments.items() if value is not None}
    if unknown := sorted(present - known - _ALWAYS_ALLOWED):
        raise UsageError(f"{caller}: unknown argument {unknown[0]!r}. A batch may have {', '.join(sorted(known))}.")


def check_cache(cache: object, media: Mapping[str, torch.Size]) -> None:
    """Refuse another library's cache, and text that continues with other images.

    Raises:
        UsageError: The cache cannot be continued.
    """
    if not isinstance(cache, KeyValueCache):
        raise UsageError(
            f"generate: past_key_values is a {type(cache).__name__}. Leave it out, or pass the one that this model's generate "
            "returned with return_dict_in_generate=True."
        )
    if cache.variant is not None and media and media != cache.media:
        raise UsageError(
            "generate: the batch has other images than the text in past_key_values. A cache continues with text alone: leave "
            "past_key_values out."
        )


def repeat_images(family: Family, batch: dict[str, Any], copies: int, samples: int) -> None:
    """Repeat everything but text, in place. Rows of patches belong to no sample: with one sample they repeat as a whole.

    Raises:
        UsageError: Several samples have images.
    """
    for name, row in family.input_layout.items():
        tensor = batch.get(name)
        if tensor is None or copies == 1:
            continue
        if row == "medium" and samples > 1:
            raise UsageError(
                f"generate: {copies} beams or answers for each of {samples} samples with images are not supported without a "
                "cache. Leave use_cache=False out."
            )
        batch[name] = torch.cat([tensor] * copies) if row == "medium" else tensor.repeat_interleave(copies, 0)


def media_shapes(family: Family, batch: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Return the shapes of a batch's images, by the processor's names."""
    names = (name for name, row in family.input_layout.items() if row != "token" and batch.get(name) is not None)
    return {name: batch[name].shape for name in names}

"""What clients without Python code of the model's need: images as a processor makes them, and files in published layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlmbuild.ir.program import Input


@dataclass(frozen=True, slots=True)
class ClientVision:
    """The host prologue of the vision tower as a graph, for clients that pass what a processor returns.

    Attributes:
        inputs: What is passed, by the names that clients use; `optional` ones may have no row.
        module: Takes them, and returns inputs of the variant "image".
        outputs: Names of those.
        optional: Inputs that a client may leave out.
    """

    inputs: tuple[Input, ...]
    module: nn.Module
    outputs: tuple[str, ...]
    optional: tuple[str, ...] = ()


ClientFiles = Mapping[str, Mapping[str, Any]]
"""Name of a JSON file -> its values."""


def image_settings(files: ClientFiles) -> dict[str, Any]:
    """The image processor's settings, from preprocessor_config.json or, as newer versions write it, processor_config.json."""
    nested = files.get("processor_config.json", {}).get("image_processor", {})
    return {**nested, **files.get("preprocessor_config.json", {})}


def with_template(files: ClientFiles, template: str | None) -> dict[str, Any]:
    """tokenizer_config.json with the chat template inside: a file beside it is not read by clients."""
    values = dict(files.get("tokenizer_config.json", {}))
    return values | ({"chat_template": template} if template else {})


def first_given(batch: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    """The tensors of a batch that are there."""
    return [batch[name] for name in names if batch.get(name) is not None]

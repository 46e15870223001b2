"""Support for clients without the model's Python code: images as a processor makes them, files in published layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlmbuild.ir.program import Input


@dataclass(frozen=True, slots=True)
class ClientVision:
    """The host prologue of the vision tower as a graph, for clients that pass a processor's output.

    Attributes:
        inputs: Inputs of the client, by the names that clients use; `optional` ones may have no row.
        module: Takes them, and returns inputs of the variant "image".
        outputs: Names of the results.
        optional: Inputs that a client may leave out.
        restores: Whether the module's last result, which is no input of the variant, numbers the rows of the tower's
            features in the order of the images: int64 (features,).
        blocks: Whether runs of image tokens see each other both ways, of which clients say nothing. Features then have one
            more column, of ones, and embeddings one of zeros, from which the decoder computes `lookahead`.
    """

    inputs: tuple[Input, ...]
    module: nn.Module
    outputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    restores: bool = False
    blocks: bool = False


ClientFiles = Mapping[str, Mapping[str, Any]]
"""Name of a JSON file -> its values."""


def image_settings(files: ClientFiles, processor_class: str, image_processor: str, resample: int = 3) -> dict[str, Any]:
    """Collect an image processor's settings, from preprocessor_config.json or, as newer versions write it,
    processor_config.json, and write out those for which transformers.js has other defaults. `resample` is the filter, by
    Pillow's number, of files that name none."""
    nested = files.get("processor_config.json", {}).get("image_processor", {})
    settings = {**nested, **files.get("preprocessor_config.json", {})}
    defaults = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": resample}
    return {
        **settings,
        **{name: default if settings.get(name) is None else settings[name] for name, default in defaults.items()},
        "processor_class": processor_class,
        "image_processor_type": image_processor,
    }


def with_template(files: ClientFiles, template: str | None) -> dict[str, Any]:
    """Put the chat template into tokenizer_config.json: clients do not read a file beside it."""
    values = dict(files.get("tokenizer_config.json", {}))
    return values | ({"chat_template": template} if template else {})


class ForClients:
    """The part of a family that serves clients without Python; here, clients that know nothing of it.

    Attributes:
        client_template_file: Whether clients read the chat template from chat_template.jinja, which sources may lack.
    """

    client_template_file: bool = False

    def client_vision(self, config: Any) -> ClientVision | None:
        """Describe the vision prologue as a graph on the inputs that clients pass; None where no client knows the family."""
        return None

    def client_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Make the inputs of `client_vision` from a processor's output; None where there is none."""
        return None

    def client_files(
        self, values: Mapping[str, Any], files: ClientFiles, template: str | None
    ) -> dict[str, Mapping[str, Any]]:
        """Write the JSON files of a checkpoint as clients read them.

        Args:
            values: Values of config.json.
            files: Files of the tokenizer and the processors.
            template: The chat template.
        """
        return {"config.json": values, "tokenizer_config.json": with_template(files, template)}

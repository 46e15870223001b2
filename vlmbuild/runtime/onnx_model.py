"""An ONNX artifact as a model: transformers' generation over ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlmbuild.errors import IncompatibleError, SourceError, UsageError
from vlmbuild.families import Family, family_named
from vlmbuild.runtime.generation import Generation
from vlmbuild.runtime.key_value_cache import KeyValueCache
from vlmbuild.runtime.onnx_decoding import OnnxDecoding, OnnxModels


class OnnxVisionLanguageModel(Generation):
    """`model(**processor_batch)` gives `.logits`; `model.generate(**processor_batch, ...)` is transformers' own generation.

    Tensors go in and come out on the CPU, whatever device the models run on. It has no weights that could be trained.
    """

    main_input_name = "input_ids"
    _is_stateful = False
    training = False

    def __init__(self, models: OnnxModels, family: Family, config: Any, processor: Any, path: Path) -> None:
        self.models = models
        self.family = family
        self.config = config
        self.processor = processor
        self.path = path
        """The artifact that it was loaded from."""
        self.generation_config = GenerationConfig.from_model_config(config)

    def __call__(
        self, *, past_key_values: KeyValueCache | None = None, logits_to_keep: int = 0, **batch: Any
    ) -> CausalLMOutputWithPast:
        """
        Args:
            past_key_values: From `new_cache`; takes the batch's keys and values. Once it has some, `input_ids` are the tokens
                that follow, and `attention_mask` is that of all.
            logits_to_keep: Make the logits of the last so many tokens of every row; 0 is all.
            **batch: The processor's output.

        Returns:
            `.logits` (batch, sequence, vocabulary).

        Raises:
            BatchError: The batch contradicts itself; the message names the sample.
            UsageError: An argument is unknown, or labels are passed.
        """
        if batch.pop("labels", None) is not None:
            raise UsageError(
                "An ONNX artifact computes no loss. Build the trainable target to train, or leave labels out."
            )
        self.check_names("model", batch)
        cache = self.new_cache() if past_key_values is None else past_key_values
        decoding = OnnxDecoding(self.models, self.family, self.config, self.processor, cache, logits_to_keep)
        return CausalLMOutputWithPast(logits=decoding.logits(batch), past_key_values=past_key_values)

    forward = __call__

    def new_cache(self, length: int | None = None) -> KeyValueCache:
        """An empty cache. Raises UsageError for one of fixed length."""
        if length is not None:
            raise UsageError("An ONNX artifact has a cache that grows. Leave cache_implementation='static' out.")
        return KeyValueCache(self.models.cached())

    @property
    def device(self) -> torch.device:
        """Where tensors go in and come out."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of embeddings and logits."""
        return next(entry.dtype for entry in self.models.decoder.inputs if entry.name == "inputs_embeds")

    def eval(self) -> OnnxVisionLanguageModel:
        """Itself: it has no other mode."""
        return self


def open_model(directory: Path, device: str) -> OnnxVisionLanguageModel:
    """The model of an ONNX artifact whose files have been verified.

    Raises:
        DeviceError: There is no execution provider for the device.
        IncompatibleError: A file does not fit the others.
    """
    try:
        program = json.loads((directory / "graph/program.json").read_text(encoding="utf-8"))
        family = family_named(program["family"])
        config = family.config(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, SourceError) as error:
        raise IncompatibleError(f"The files of {directory} do not belong together: {error} Build it again.") from error
    processor = family.processor(directory)
    return OnnxVisionLanguageModel(OnnxModels.open(directory, device), family, config, processor, directory)

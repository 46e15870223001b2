"""The common base of models of exported artifacts: called and generating like trainable ones, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import GenerationConfig

from vlmbuild.errors import UsageError
from vlmbuild.families import Family
from vlmbuild.runtime.hf import CausalLMOutputWithPast, Model, check_names
from vlmbuild.runtime.key_value_cache import KeyValueCache


class InferenceModel(Model):
    """A model of an artifact that cannot be trained."""

    training = False
    target: ClassVar[str]
    """Target of the artifact."""

    def __init__(self, family: Family, config: Any, processor: Any, path: Path) -> None:
        self.family = family
        self.config = config
        self.processor = processor
        self.path = path
        self.artifact_id = None
        self.generation_config = GenerationConfig.from_model_config(config)

    def logits(self, batch: dict[str, Tensor], cache: KeyValueCache, keep: int) -> Tensor:
        """Return logits (batch, kept tokens, vocabulary) of a prompt, or of the tokens after one."""
        raise NotImplementedError

    def __call__(
        self, *, past_key_values: KeyValueCache | None = None, logits_to_keep: int = 0, **batch: Any
    ) -> CausalLMOutputWithPast:
        """
        Args:
            past_key_values: Cache from `new_cache`, which receives the batch's keys and values. Once it has some, `input_ids`
                are the following tokens, and `attention_mask` covers all.
            logits_to_keep: Number of last tokens per row that get logits; 0 is all.
            **batch: Output of the processor.

        Returns:
            `.logits` (batch, sequence, vocabulary).

        Raises:
            BatchError: The batch contradicts itself; the message names the sample.
            UsageError: An argument is unknown, or labels are passed.
        """
        if batch.pop("labels", None) is not None:
            raise UsageError(
                f"An artifact of target {self.target} computes no loss. Leave labels out, or build with --target trainable."
            )
        check_names(self.family, "model", batch)
        cache = self.new_cache() if past_key_values is None else past_key_values
        logits = self.logits(batch, cache, logits_to_keep)
        if past_key_values is None:
            self.family.compare_positions(batch, self.config)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    forward = __call__

    def eval(self) -> Self:
        """Return the model: it has no other mode."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Return the model for False. Raises UsageError for True: it cannot be trained."""
        if mode:
            raise UsageError(f"An artifact of target {self.target} cannot train. Build with --target trainable.")
        return self

    def to(self, *targets: str | torch.device | torch.dtype, **named: str | torch.device | torch.dtype) -> Self:
        """Return the model, if that changes nothing.

        Args:
            *targets, **named: A device or a dtype, as `torch.nn.Module.to` takes them.

        Raises:
            UsageError: The device or dtype is not the artifact's.
        """
        for target in (*targets, *named.values()):
            kind = target if isinstance(target, torch.dtype) else torch.device(target)
            if kind not in (self.dtype, self.device):
                raise UsageError(self._cannot_move(kind))
        return self

    def _cannot_move(self, target: torch.device | torch.dtype) -> str:
        """Return the message that a conversion is refused with."""
        raise NotImplementedError

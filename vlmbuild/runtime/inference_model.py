"""What models of exported artifacts have in common: they are called and generate like trainable ones, and cannot train."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import GenerationConfig

from vlmbuild.errors import UsageError
from vlmbuild.families import Family
from vlmbuild.runtime.generation import check_names
from vlmbuild.runtime.hf import CausalLMOutputWithPast, GenerationHooks
from vlmbuild.runtime.key_value_cache import KeyValueCache


class InferenceModel(GenerationHooks):
    """A model of an artifact, without weights that could be trained."""

    training = False
    target: ClassVar[str]
    """Of the artifact."""

    def __init__(self, family: Family, config: Any, processor: Any, path: Path) -> None:
        self.family = family
        self.config = config
        self.processor = processor
        self.path = path
        """The artifact that it was loaded from."""
        self.generation_config = GenerationConfig.from_model_config(config)

    @property
    def device(self) -> torch.device:
        """Where tensors go in and come out."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of embeddings and logits."""
        raise NotImplementedError

    def logits(self, batch: dict[str, Tensor], cache: KeyValueCache, keep: int) -> Tensor:
        """(batch, kept tokens, vocabulary) of a prompt, or of the tokens after one."""
        raise NotImplementedError

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
                f"An artifact of target {self.target} computes no loss. Build the trainable target to train, or leave labels "
                "out."
            )
        check_names(self.family, "model", batch)
        cache = self.new_cache() if past_key_values is None else past_key_values
        return CausalLMOutputWithPast(logits=self.logits(batch, cache, logits_to_keep), past_key_values=past_key_values)

    forward = __call__

    def eval(self) -> Self:
        """Itself: it has no other mode."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Itself for False. Raises UsageError: it has no weights that could be trained."""
        if mode:
            raise UsageError(f"An artifact of target {self.target} cannot train. Build the trainable target.")
        return self

    def to(self, *targets: str | torch.device | torch.dtype, **named: str | torch.device | torch.dtype) -> Self:
        """Itself, if that changes nothing.

        Args:
            *targets, **named: A device or a dtype, as `torch.nn.Module.to` takes them.

        Raises:
            UsageError: What was exported stays what it is.
        """
        for target in (*targets, *named.values()):
            wanted = target if isinstance(target, torch.dtype) else torch.device(target)
            if wanted not in (self.dtype, self.device):
                raise UsageError(self._elsewhere(wanted))
        return self

    def _elsewhere(self, target: torch.device | torch.dtype) -> str:
        """Why it cannot be there, and what to do."""
        raise NotImplementedError


def dtype_name(dtype: torch.dtype) -> str:
    """As options name it."""
    return str(dtype).removeprefix("torch.")

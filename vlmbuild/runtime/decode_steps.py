"""Prompts and steps of a generation: everything around running the graphs that torch and ONNX Runtime have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from vlmbuild.errors import BatchError
from vlmbuild.families import Family, PackedBatch, check_ids
from vlmbuild.ir.program import Variant
from vlmbuild.kv_cache.program import MASK, TOKENS
from vlmbuild.runtime.hf import Model, media_shapes
from vlmbuild.runtime.key_value_cache import KeyValueCache

_PROMPT_ONLY = {"position_ids", "inputs_embeds"}
"""Arguments that a step would ignore."""


@dataclass(frozen=True, slots=True)
class PromptResult:
    """Results of a prompt.

    Attributes:
        logits: (batch, kept tokens, vocabulary).
        variant: Variant of the program that runs the tokens after it.
        images: Inputs of that variant that depend on images alone, by name.
        tokens: Its inputs with a row per token, by name: (batch * sequence, ...). New tokens take the row of the last one.
    """

    logits: Tensor
    variant: str
    images: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)


M = TypeVar("M", bound=Model)


@dataclass(frozen=True)
class DecodeSteps(ABC, Generic[M]):
    """Runs tokens on one model and cache.

    Attributes:
        model: Bound to weights.
        cache: Receives the tokens' keys and values.
        keep: Number of last tokens per row that get logits; 0 is all.
    """

    model: M
    cache: KeyValueCache
    keep: int = 0

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Run a prompt, or the tokens after one.

        Args:
            batch: The processor's output for a prompt; then `input_ids` (batch, new) and, if any token is padding,
                `attention_mask` (batch, past + new).

        Returns:
            (batch, kept tokens, vocabulary).

        Raises:
            BatchError: The batch contradicts itself, or the cache.
            UsageError: A static cache is full.
        """
        return self._prompt(batch) if self.cache.variant is None else self._step(batch, self.cache.variant)

    @abstractmethod
    def run_prompt(self, batch: Mapping[str, Any], prepared: PackedBatch, mask: Tensor) -> PromptResult:
        """Run one row per sample, and put keys and values into the cache."""

    @abstractmethod
    def run_step(self, variant: str, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Return logits of new tokens (batch, new), after putting their keys and values into the cache."""

    def _prompt(self, batch: Mapping[str, Any]) -> Tensor:
        model, cache = self.model, self.cache
        batch = {name: value for name, value in batch.items() if value is not None}
        batch |= {name: batch[name][:: cache.copies] for name in ("input_ids", MASK) if name in batch}
        prepared = model.family.prepare(batch, model.config, model.processor)
        rows, length = batch["input_ids"].shape
        mask = whole_mask(batch.get(MASK), rows, length, model.device)
        result = self.run_prompt(batch, prepared, mask)
        cache.positions, last = (ends.to(model.device) for ends in row_ends(prepared, mask.shape))
        cache.variant = result.variant
        cache.images |= result.images
        cache.rows |= {name: tensor[last] for name, tensor in result.tokens.items()}
        cache.media = media_shapes(model.family, batch)
        if cache.copies > 1:
            cache.batch_repeat_interleave(cache.copies)
        return result.logits.repeat_interleave(cache.copies, 0)

    def _step(self, batch: Mapping[str, Any], variant: str) -> Tensor:
        model = self.model
        check_step(batch, model.family)
        ids, past = batch["input_ids"], self.cache.get_seq_length()
        mask, positions = step_positions(self.cache, batch, model.device)
        if "cpu" in (ids.device.type, model.device.type):  # elsewhere every step would wait for the GPU
            check_ids(ids.cpu(), model.family.vocabulary(model.config))
        logits = self.run_step(variant, ids.to(model.device), mask, positions)
        self.cache.positions = self.cache.positions + mask[:, past:].sum(1)
        return logits


def unpack_to_padded(prepared: PackedBatch, variant: Variant, shape: torch.Size) -> dict[str, Tensor]:
    """Return a prepared batch with a row for every position of `input_ids`, of this shape. Rows of padding are zero, and
    nothing reads them."""
    inputs = {}
    for entry in variant.inputs:
        tensor = prepared.tensors.get(entry.name)
        if tensor is not None and TOKENS in entry.shape:
            tensor = padded_rows(tensor, prepared, entry.shape.index(TOKENS), shape)
        if tensor is not None:
            inputs[entry.name] = tensor
    return inputs


def padded_rows(packed: Tensor, prepared: PackedBatch, axis: int, shape: torch.Size) -> Tensor:
    """Return packed rows along `axis` as `shape.numel()` rows, with zeros at padding."""
    positions = prepared.index.to(packed.device)
    if len(positions) == shape.numel():
        return packed
    padded = packed.new_zeros((*packed.shape[:axis], shape.numel(), *packed.shape[axis + 1 :]))
    return padded.index_copy(axis, positions, packed)


def row_ends(prepared: PackedBatch, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the position after each row's last token, and that token's index in the flattened `input_ids` of this shape:
    int64 (batch,), on the CPU."""
    batch, length = shape
    samples, start = prepared.index // length, torch.full((batch,), -1)
    highest = prepared.tensors["position_ids"].flatten(0, -2).amax(0)
    following = start.scatter_reduce(0, samples, highest, "amax") + 1
    return following, start.scatter_reduce(0, samples, prepared.index, "amax")


def check_step(batch: Mapping[str, Any], family: Family) -> None:
    """Refuse arguments that a cached step would ignore.

    Raises:
        BatchError: There is such an argument, or there are no tokens.
    """
    if batch.get("input_ids") is None:
        raise BatchError("There are no input_ids. A cache continues with the tokens that follow.")
    prompts = {name for name, row in family.input_layout.items() if row != "token"} | _PROMPT_ONLY
    if extra := sorted(name for name in prompts if batch.get(name) is not None):
        raise BatchError(
            f"{extra[0]} belongs to a prompt, and past_key_values holds one already. Pass only the tokens that follow, or "
            "start over with the whole conversation and a new cache."
        )


def step_positions(cache: KeyValueCache, batch: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the mask of all tokens, int64 (rows, past + new), and the positions of the new ones, (rows, new).

    Raises:
        BatchError: Rows or mask do not fit the cache.
    """
    (rows, new), past = batch["input_ids"].shape, cache.get_seq_length()
    if rows != len(cache.positions):
        raise BatchError(f"input_ids have {rows} rows, but the cache has {len(cache.positions)}. Pass one for each.")
    mask = whole_mask(batch.get(MASK), rows, past + new, device)
    return mask, (cache.positions[:, None] + mask[:, past:].cumsum(1) - 1).clamp(min=0)


def whole_mask(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Return an int64 mask (batch, length) with one at every token that is no padding.

    Raises:
        BatchError: The mask has another shape.
    """
    if mask is None:
        return torch.ones(batch, length, dtype=torch.int64, device=device)
    if mask.shape != (batch, length):
        raise BatchError(
            f"attention_mask has shape {tuple(mask.shape)}, but with the tokens in the cache there are {batch} rows of "
            f"{length} tokens. Pass the mask of all of them."
        )
    return mask.to(device).long()

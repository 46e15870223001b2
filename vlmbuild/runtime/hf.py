"""Hooks of transformers, accelerate and TRL that are not public API, each with its caller and the reason.

Other modules of the runtime import public names of `transformers` alone, so that a new version needs changes here and in
`families/*/model.py` only. Read against transformers 5.23, accelerate 1.15 and TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from vlmbuild.errors import UsageError
from vlmbuild.families import Family
from vlmbuild.runtime.generation import check_cache, check_names, media_shapes, repeat_images
from vlmbuild.runtime.key_value_cache import KeyValueCache

__all__ = ["BaseModelOutputWithPast", "CausalLMOutputWithPast", "GenerationHooks", "TrainerHooks", "TrainingOutput"]

_LENGTH_MULTIPLE = 64
"""Static caches have room for a multiple of this many tokens, to compile for few lengths."""


@dataclass
class TrainingOutput(ModelOutput):
    """Loss of a batch, with logits on demand: training needs none, and they are by far its largest tensor.

    Trainers read `output.loss` or `output["loss"]`, and some of them `output.logits`. A wrapper that builds its own output
    from the items (accelerate's mixed precision, FSDP) leaves the logits out: `.logits` is None there.
    """

    loss: Tensor | None = None

    def with_logits(self, compute: Callable[[], Tensor]) -> TrainingOutput:
        """Let `.logits` call `compute` on first access."""
        self.__dict__["_compute_logits"] = compute
        return self

    @cached_property
    def logits(self) -> Tensor | None:
        """Logits (batch, sequence, vocabulary)."""
        compute = self.__dict__.pop("_compute_logits", None)
        return None if compute is None else compute()

    def __getitem__(self, key: Any) -> Any:
        return self.logits if key == "logits" else super().__getitem__(key)  # type: ignore[no-untyped-call]

    def get(self, key: Any, default: Any = None) -> Any:
        return self.logits if key == "logits" else super().get(key, default)


class TrainerHooks:
    """Names that trainers look up on a model."""

    accepts_loss_kwargs = True
    """Makes transformers' Trainer pass `num_items_in_batch`, and not divide the loss of accumulated batches again."""
    _no_split_modules = ("RegionInstance",)
    """Class that accelerate's FSDP policy for transformers shards as one unit."""
    model_tags: tuple[str, ...] = ()
    """Tags that transformers' Trainer writes into model cards."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings_issued: dict[str, bool] = {}
        """Flags that TRL's trainers set to silence warnings of transformers' models."""

    def add_model_tags(self, tags: str | Iterable[str]) -> None:
        """Add tags, as every TRL trainer does when it is made."""
        self.model_tags += (tags,) if isinstance(tags, str) else tuple(tags)


class GenerationHooks(GenerationMixin):
    """Greedy search, sampling, beams and assisted decoding; `use_cache=False` runs the whole sequence for every token."""

    family: Family
    main_input_name = "input_ids"
    """Argument that generation treats as the prompt, and that the Trainer counts tokens of."""
    _is_stateful = False
    """False allows assisted decoding, which needs a cache that can be cropped."""

    def new_cache(self, length: int | None = None) -> KeyValueCache:
        """Return an empty cache: dynamic, or with room for `length` tokens."""
        raise NotImplementedError

    @classmethod
    def can_generate(cls) -> bool:
        """Return True; generate() refuses a model otherwise."""
        return True

    def get_experts_implementation(self) -> dict[str, str]:
        """Return nothing: no mixtures of experts, whose implementation generate() would switch while it runs."""
        return {}

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: KeyValueCache | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        **batch: Any,
    ) -> dict[str, Any]:
        """Return a step's arguments: with a cache the new tokens, and images with the first; without a cache everything.

        The inherited method slices by names that this model does not have.
        """
        inputs = {"attention_mask": attention_mask, "logits_to_keep": logits_to_keep}
        images = {name: batch[name] for name in self.family.input_layout if batch.get(name) is not None}
        if past_key_values is None:
            return {"input_ids": input_ids, **inputs, **images}
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        first = past_key_values.variant is None
        return {"input_ids": input_ids, "past_key_values": past_key_values, **inputs, **(images if first else {})}

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: object,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Create this model's own cache, unless the caller passed one.

        Called by generate() once arguments are expanded; the inherited method would create a DynamicCache.
        """
        form = generation_config.cache_implementation
        copies = model_kwargs.pop("copies", 1)
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            check_cache(cache, media_shapes(self.family, model_kwargs))
            cache._is_user_defined = True  # assisted decoding returns such a cache
        elif generation_config.use_cache is not False:
            if form not in (None, "dynamic", "static"):
                raise UsageError(
                    f"generate: cache_implementation {form!r} is not supported; use 'dynamic' or 'static'."
                )
            length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            rounded = -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
            cache = model_kwargs["past_key_values"] = self.new_cache(rounded if form == "static" else None)
        if cache is None:
            repeat_images(self.family, model_kwargs, copies, batch_size)
        else:
            cache.copies = copies

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Check the names passed to generate(); the inherited check reads the signature of `forward`."""
        check_names(self.family, "generate", model_kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Extend inputs by token after each step: without a cache, a new token sees the images that the last one saw."""
        names = [name for name, row in self.family.input_layout.items() if row == "token"]
        lengths = {name: model_kwargs[name].shape[1] for name in names if model_kwargs.get(name) is not None}
        batch: dict[str, Any] = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        for name, length in lengths.items():
            if batch.get("past_key_values") is None and batch[name].shape[1] == length:
                batch[name] = torch.cat([batch[name], batch[name][:, -1:]], dim=1)
        return batch

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat the text for beams and for several answers, and leave images as they are.

        With a cache a prompt runs once per sample, and the cache is repeated; the inherited method would repeat patches.
        """
        names = [name for name in self.family.input_layout if kwargs.get(name) is not None]
        images = {name: kwargs.pop(name) for name in names}
        expand: Callable[..., Any] = GenerationMixin._expand_inputs_for_generation
        ids, expanded = expand(self, expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, {**expanded, **images, "copies": expand_size}

"""transformers' generation: names of a batch, its key-value cache, and how it grows and is repeated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from vlmbuild.errors import UsageError
from vlmbuild.families import Family
from vlmbuild.runtime.key_value_cache import KeyValueCache

# What callers of transformers' models pass as a habit, and what `prepare` refuses with a reason of its own.
_PASSED_ALONG = {"return_dict", "use_cache", "position_ids", "inputs_embeds", "past_key_values", "logits_to_keep"}

_LENGTHS = 64
"""Static caches have room for a multiple of so many tokens, so that few lengths are compiled for."""


class Generation(GenerationMixin):
    """Greedy search, sampling, beams and assisted decoding; `use_cache=False` runs the whole sequence for every token."""

    family: Family

    def new_cache(self, length: int | None = None) -> KeyValueCache:
        """An empty cache, growing or with room for so many tokens."""
        raise NotImplementedError

    def check_names(self, caller: str, given: Mapping[str, Any]) -> None:
        """Refuse misspelled names, which would be ignored."""
        known = {"input_ids", "attention_mask", *self.family.input_layout}
        unknown = sorted(key for key, value in given.items() if value is not None and key not in known | _PASSED_ALONG)
        if unknown:
            raise UsageError(f"{caller}: unknown argument {unknown[0]!r}. A batch may have {', '.join(sorted(known))}.")

    @classmethod
    def can_generate(cls) -> bool:
        """transformers asks."""
        return True

    def get_experts_implementation(self) -> dict[str, str]:
        """transformers asks; there are no mixtures of experts."""
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
        """What a step passes to the model: with a cache the new tokens, and with the first of them the images; without a
        cache everything."""
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
        """Make the cache that the caller asks for, unless there is one."""
        form = generation_config.cache_implementation
        copies = model_kwargs.pop("copies", 1)
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            check_cache(cache, media_shapes(self.family, model_kwargs))
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            if form not in (None, "dynamic", "static"):
                raise UsageError(
                    f"generate: cache_implementation {form!r} is not supported; use 'dynamic' or 'static'."
                )
            length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            rounded = -(-length // _LENGTHS) * _LENGTHS
            cache = model_kwargs["past_key_values"] = self.new_cache(rounded if form == "static" else None)
        if cache is None:
            repeat_images(self.family, model_kwargs, copies, batch_size)
        else:
            cache.copies = copies

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """transformers calls this with what was passed to `generate`."""
        self.check_names("generate", model_kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Without a cache, a generated token looks where the last one looked; a cache knows."""
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
        """Repeat the text, for beams and for several answers. Images stay as they are: with a cache the prompt is run once a
        sample, and what it leaves is repeated."""
        names = [name for name in self.family.input_layout if kwargs.get(name) is not None]
        media = {name: kwargs.pop(name) for name in names}
        expand: Callable[..., Any] = GenerationMixin._expand_inputs_for_generation
        ids, expanded = expand(self, expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, {**expanded, **media, "copies": expand_size}


def repeat_images(family: Family, batch: dict[str, Any], copies: int, samples: int) -> None:
    """Repeat what a batch has besides text, in place. Rows of patches and grids are no samples: those of the only sample are
    repeated as a whole.

    Raises:
        UsageError: There are several.
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
    """Shapes of a batch's images."""
    names = (name for name, row in family.input_layout.items() if row != "token" and batch.get(name) is not None)
    return {name: batch[name].shape for name in names}


def check_cache(cache: object, media: Mapping[str, torch.Size]) -> None:
    """Refuse a cache of another make, and text that goes on with further images.

    Raises:
        UsageError: It is so.
    """
    if not isinstance(cache, KeyValueCache):
        raise UsageError(
            f"generate: past_key_values is a {type(cache).__name__}. Leave it out, or pass the one that this model's generate "
            "returned with return_dict_in_generate=True."
        )
    if cache.variant is not None and media and media != cache.media:
        raise UsageError(
            "generate: the batch has other images than those of the text that past_key_values holds. A cache goes on with "
            "text alone: leave past_key_values out."
        )

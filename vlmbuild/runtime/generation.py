"""transformers' generation on a model without a key-value cache: names of a batch, and how it grows and is repeated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from vlmbuild.errors import UsageError
from vlmbuild.families import Family

# What callers of transformers' models pass as a habit, and what `prepare` refuses with a reason of its own.
_PASSED_ALONG = {"return_dict", "use_cache", "position_ids", "inputs_embeds", "past_key_values"}


class WithoutCache(GenerationMixin):
    """Greedy search, sampling and beams, where every step runs the whole sequence."""

    family: Family

    def check_names(self, caller: str, given: Mapping[str, Any]) -> None:
        """Refuse misspelled names, which would be ignored."""
        known = {"input_ids", "attention_mask", *self.family.batch_rows}
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
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **batch: Any
    ) -> dict[str, Any]:
        """Every step runs the whole sequence: this target has no key-value cache."""
        kept = {key: value for key, value in batch.items() if key in self.family.batch_rows and value is not None}
        return {"input_ids": input_ids, "attention_mask": attention_mask, **kept}

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """transformers calls this with what was passed to `generate`."""
        self.check_names("generate", model_kwargs)

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A generated token looks where the last one looked."""
        batch: dict[str, Any] = super()._update_model_kwargs_for_generation(*args, **kwargs)
        for name, row in self.family.batch_rows.items():
            if row == "token" and batch.get(name) is not None:
                batch[name] = torch.cat([batch[name], batch[name][:, -1:]], dim=1)
        return batch

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat the samples, for beams and for several answers. transformers would repeat every row of every tensor, but
        rows of patches and grids are no samples: those of the only sample are repeated as a whole."""
        lists = [name for name, row in self.family.batch_rows.items() if row == "medium"] if expand_size > 1 else []
        media = {key: kwargs.pop(key) for key in lists if kwargs.get(key) is not None}
        if media and input_ids is not None and len(input_ids) > 1:
            raise UsageError(
                f"generate: {expand_size} beams or answers for each of {len(input_ids)} samples with images are not "
                "supported. Pass one sample at a time."
            )
        expand: Callable[..., Any] = GenerationMixin._expand_inputs_for_generation
        ids, expanded = expand(self, expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, expanded | {key: torch.cat([value] * expand_size) for key, value in media.items()}

"""Hooks of transformers, accelerate and TRL that are not public API, each with its caller and the reason.

Other modules of the runtime import public names of `transformers` alone, so that a new version needs changes here and in
`model.py` and `processor.py` of the families only. Read against transformers 5.23, accelerate 1.15 and TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from vlmbuild.errors import UsageError
from vlmbuild.families import Family
from vlmbuild.runtime.key_value_cache import KeyValueCache

__all__ = ["BaseModelOutputWithPast", "CausalLMOutputWithPast", "Model", "TrainerHooks", "TrainingOutput"]

_HABITUAL = {"return_dict", "use_cache", "position_ids", "inputs_embeds", "past_key_values", "logits_to_keep"}
"""Arguments that callers pass by habit: return_dict, use_cache and logits_to_keep have no effect; `prepare` refuses the
others."""
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


def _refusal(name: str, advice: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise UsageError(f"A vlmbuild model has no {name}: its graph was made when it was built. {advice}")

    return refuse


class TrainerHooks(PreTrainedModel):
    """transformers' own model class, by which trainers decide how to save, count and shard a model.

    Its methods that would change modules are refused, since graphs read parameters by themselves.
    """

    config_class = PreTrainedConfig
    accepts_loss_kwargs = True
    """Makes transformers' Trainer pass `num_items_in_batch`, and not divide the loss of accumulated batches again."""
    _no_split_modules = ("RegionInstance",)  # type: ignore[assignment]
    """Class that accelerate's FSDP policy for transformers shards as one unit."""
    _supports_sdpa = True
    """Leaves the config's attention as it is; the graph has its own."""
    supports_gradient_checkpointing = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.warnings_issued: dict[str, bool] = {}
        """Flags that TRL's trainers set to silence warnings of transformers' models."""

    if TYPE_CHECKING:  # without annotations in transformers

        def to(self, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
            """Convert in place."""

        def eval(self) -> Self:
            """Turn dropout off."""

        def train(self, mode: bool = True) -> Self:
            """Turn dropout on, or off."""

    from_pretrained = classmethod(
        _refusal("from_pretrained", "Call vlmbuild.from_pretrained(SOURCE) or vlmbuild.load.")
    )
    add_adapter = _refusal("add_adapter", "Call vlmbuild.add_lora(model, r=16).")
    load_adapter = _refusal("load_adapter", "Call vlmbuild.load_adapter(model, DIRECTORY).")
    disable_adapters = _refusal("disable_adapters", "Use `with model.disable_adapter():`.")
    enable_adapters = _refusal("enable_adapters", "Use `with model.disable_adapter():`.")
    set_attn_implementation = _refusal("set_attn_implementation", "Build with --attention.")
    dequantize = _refusal("dequantize", "Build the source with --quantize none.")

    def resized_tables(self, embeddings: Tensor, head: Tensor, rows: int, mean: bool) -> tuple[Tensor, Tensor]:
        """Add or drop rows at the end of two tables, as `resize_token_embeddings` of transformers does.

        These are its own steps, which need its own modules, so that equal seeds give equal rows. A head that is the
        embeddings stays that.
        """
        table = nn.Embedding.from_pretrained(embeddings.detach())
        new: Tensor = self._get_resized_embeddings(table, rows, mean_resizing=mean).weight.detach()
        if head is embeddings:
            return new, new
        linear = nn.Linear(head.shape[1], head.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(head.detach())
        return new, self._get_resized_lm_head(linear, rows, mean_resizing=mean).weight.detach()


class Model(GenerationMixin):
    """An opened artifact of any target: called with a processor's batch it computes `.logits`, and it generates by greedy
    search, sampling, beams and assisted decoding.

    There is always a key-value cache: `use_cache=False` would give the same tokens, and only take longer.

    Attributes:
        family: The model family.
        config: The transformers config.
        generation_config: Defaults and ends of generation, the checkpoint's own where it has them.
        processor: Makes the batches that the model is called with, and sets their pixel limits.
        path: Directory of its artifact.
        artifact_id: Id of its artifact.
    """

    family: Family
    config: Any
    generation_config: GenerationConfig
    processor: Any
    path: Path | None
    artifact_id: str | None
    main_input_name = "input_ids"
    """Argument that generation treats as the prompt, and that the Trainer counts tokens of."""
    _is_stateful = False
    """False allows assisted decoding, which needs a cache that can be cropped."""

    @property
    def device(self) -> torch.device:
        """Device of inputs and outputs."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of embeddings and logits."""
        raise NotImplementedError

    def new_cache(self, length: int | None = None) -> KeyValueCache:
        """Return an empty cache: dynamic, or with room for `length` tokens."""
        raise NotImplementedError

    if TYPE_CHECKING:

        def __call__(self, **batch: Any) -> Any:
            """Compute `.logits` (batch, sequence, vocabulary) of a processor's batch."""

        def generate(self, *args: Any, **batch: Any) -> Any:
            """Generate tokens after a processor's batch, as transformers does."""

    @classmethod
    def can_generate(cls) -> bool:
        """Return True; generate() refuses a model otherwise."""
        return True

    def get_experts_implementation(self) -> dict[str, str | None]:
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
        """Return a step's arguments: the new tokens, and images with the first ones.

        The inherited method slices by names that this model does not have.
        """
        assert past_key_values is not None  # made by `_prepare_cache_for_generation`
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        images = batch if past_key_values.variant is None else {}
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "logits_to_keep": logits_to_keep,
            **{name: images[name] for name in self.family.input_layout if images.get(name) is not None},
        }

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
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            if form not in (None, "dynamic", "static"):
                raise UsageError(
                    f"generate: cache_implementation {form!r} is not supported; use 'dynamic' or 'static'."
                )
            length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            rounded = -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
            cache = model_kwargs["past_key_values"] = self.new_cache(rounded if form == "static" else None)
        else:
            _check_cache(cache, media_shapes(self.family, model_kwargs))
            cache._is_user_defined = True  # assisted decoding returns such a cache
        cache.copies = model_kwargs.pop("copies", 1)
        generation_config.use_cache = True

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Check the names passed to generate(); the inherited check reads the signature of `forward`."""
        check_names(self.family, "generate", model_kwargs)

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat the text for beams and for several answers, and leave images as they are.

        A prompt runs once per sample, and the cache is repeated; the inherited method would repeat patches.
        """
        names = [name for name in self.family.input_layout if kwargs.get(name) is not None]
        images = {name: kwargs.pop(name) for name in names}
        expand: Callable[..., Any] = GenerationMixin._expand_inputs_for_generation
        ids, expanded = expand(self, expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, {**expanded, **images, "copies": expand_size}


def check_names(family: Family, caller: str, arguments: Mapping[str, Any]) -> None:
    """Refuse misspelled names, which would be ignored.

    Raises:
        UsageError: A name is unknown.
    """
    known = {"input_ids", "attention_mask", *family.input_layout}
    present = {name for name, value in arguments.items() if value is not None}
    if unknown := sorted(present - known - _HABITUAL):
        raise UsageError(f"{caller}: unknown argument {unknown[0]!r}. A batch may have {', '.join(sorted(known))}.")


def _check_cache(cache: object, media: Mapping[str, torch.Size]) -> None:
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


def media_shapes(family: Family, batch: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Return the shapes of a batch's images, by the processor's names."""
    names = (name for name, row in family.input_layout.items() if row != "token" and batch.get(name) is not None)
    return {name: batch[name].shape for name in names}

"""The traced modules that families share: transformers' models on meta tensors, for packed batches with and without images."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class KeyGroups(NamedTuple):
    """The keys that a query of an attention layer sees, by groups; a core module passes it to transformers as the attention
    mask, and capture to the operator.

    Attributes:
        key_groups: int32 (keys,), the group of every key.
        visible_groups: bool (queries, groups).
    """

    key_groups: Tensor
    visible_groups: Tensor


class Segments(NamedTuple):
    """Bounds within which an attention layer attends; a core module passes them as the attention mask to a tower that passes
    no keywords on.

    Attributes:
        cu_seqlens: int32 (segments + 1,).
    """

    cu_seqlens: Tensor


def meta_module(model_class: Any, config: Any, attention: str, dtype: torch.dtype) -> Any:
    """Construct a transformers model on the meta device whose attention runs through our registered implementation.

    It gets a copy of the config, which may be shared with a model that runs.
    """
    with torch.device("meta"):
        model = model_class._from_config(deepcopy(config), dtype=dtype, attn_implementation="eager")
    # transformers refuses to construct a model with an implementation named "flash" that is not a kernel package
    for part in (model.config, *(getattr(model.config, key) for key in model.config.sub_configs)):
        part._attn_implementation = attention
    return model.eval()


class TextCore(nn.Module):
    """The traced module of a batch without images; its children carry transformers' names.

    A batch is packed: the tokens of all samples in one row, no padding, with the samples' bounds for attention.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.model
        self.lm_head = model.lm_head

    def forward(self, input_ids: Tensor, position_ids: Tensor, text_cu_seqlens: Tensor) -> Tensor:
        return self.logits(self.embed(input_ids), position_ids, text_cu_seqlens)

    def embed(self, input_ids: Tensor) -> Tensor:
        embeddings: Tensor = self.model.get_decoder().embed_tokens(input_ids)
        return embeddings

    def logits(self, embeddings: Tensor, position_ids: Tensor, text_cu_seqlens: Tensor, **cross: Any) -> Tensor:
        """Run the language model; `cross` are further arguments of its layers."""
        hidden = self.model.get_decoder()(
            inputs_embeds=embeddings, position_ids=position_ids, cu_seq_lens_q=text_cu_seqlens, use_cache=False, **cross
        ).last_hidden_state
        logits: Tensor = self.lm_head(hidden)
        return logits


class FeatureCore(TextCore):
    """The traced module of a batch with images whose features take the places of placeholder tokens."""

    def forward(  # type: ignore[override]  # a variant's inputs are passed by name
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        text_cu_seqlens: Tensor,
        feature_index: Tensor,
        pixel_values: Tensor,
        vision_position_ids: Tensor,
        vision_cu_seqlens: Tensor,
    ) -> Tensor:
        features = self.features(pixel_values, vision_position_ids, vision_cu_seqlens)
        return self.read(input_ids, position_ids, text_cu_seqlens, feature_index, features)

    def read(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        text_cu_seqlens: Tensor,
        feature_index: Tensor,
        features: Tensor,
        **layers: Any,
    ) -> Tensor:
        """Run the language model on text with features; `layers` are further arguments of its layers."""
        embeddings = place_features(self.embed(input_ids), features, feature_index)
        return self.logits(embeddings, position_ids, text_cu_seqlens, **layers)

    def features(self, pixel_values: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Run the vision tower and the projector: packed patches (patches, pixels) -> (features, hidden)."""
        raise NotImplementedError


def embed_patches(convolution: nn.Conv2d, pixel_values: Tensor) -> Tensor:
    """Embed patches (n, channels * patch * patch) -> (n, width). Kernel and stride of the convolution are one patch, so it
    is a product with every patch."""
    weight = convolution.weight
    return nn.functional.linear(pixel_values.to(weight.dtype), weight.flatten(1), convolution.bias)


def place_features(embeddings: Tensor, features: Tensor, feature_index: Tensor) -> Tensor:
    """Put features (n, hidden) into embeddings (1, tokens, hidden) where `feature_index` (1, tokens) is not -1.

    Equal to transformers' masked_scatter, without a data-dependent size.
    """
    placed = features[feature_index.clamp(min=0)].to(embeddings.dtype)  # row 0 where it is not used
    return torch.where((feature_index >= 0).unsqueeze(-1), placed, embeddings)

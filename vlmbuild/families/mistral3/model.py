"""Mistral 3: config, modules to trace. Tower, processor and batches are Pixtral's, with patches merged in squares."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Mistral3Config, Mistral3ForConditionalGeneration
from transformers.models.ministral3.modeling_ministral3 import Ministral3RotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from vlmbuild.families.config_checks import require
from vlmbuild.families.gguf import GgufModel
from vlmbuild.families.mistral3 import gguf
from vlmbuild.families.pixtral.model import PixtralTower, TowerCore


class _ImageCore(TowerCore):
    def project(self, states: Tensor) -> Tensor:
        projector = self.model.multi_modal_projector
        merger = projector.patch_merger
        blocks = projector.norm(states).unflatten(1, (-1, merger.spatial_merge_size**2))
        # The four patches of a block lie in a row; the merger's weights have the channels outside of them, as unfold does.
        merged = merger.merging_layer(blocks.transpose(2, 3).flatten(2).squeeze(0))
        features: Tensor = projector.linear_2(projector.act(projector.linear_1(merged)))
        return features


class Mistral3(PixtralTower):
    """`Mistral3ForConditionalGeneration`: Mistral Small 3.1 and 3.2, and Ministral 3.

    Ministral 3 scales queries by their absolute position. Padding on the left does not count, as in transformers' generate;
    its forward counts it unless it is given positions.
    """

    name = "mistral3"
    title = "Mistral 3"
    architectures = ("Mistral3ForConditionalGeneration",)
    config_class = Mistral3Config
    model_class = Mistral3ForConditionalGeneration
    image_core = _ImageCore
    merges_patches = True
    text_rotary: Mapping[str, Any] = {"mistral": MistralRotaryEmbedding, "ministral3": Ministral3RotaryEmbedding}

    def config(self, values: Mapping[str, Any]) -> Any:
        # transformers ties where the top level says nothing, and then not, since published files hold both tensors.
        text = values.get("text_config")
        tied = isinstance(text, Mapping) and text.get("tie_word_embeddings", False)
        return super().config({"tie_word_embeddings": tied, **values})

    def gguf_model(self, config: Any, processor: Any = None) -> GgufModel:
        return gguf.model(config, processor)

    def compare_positions(self, batch: Mapping[str, Any], config: Any) -> None:
        rope, mask = config.text_config.rope_parameters, batch.get("attention_mask")
        length = rope["original_max_position_embeddings"] if rope.get("llama_4_scaling_beta") else None
        if not length or mask is None:
            return
        mask = mask.cpu().bool()
        positions, columns = mask.long().cumsum(1) - 1, torch.arange(mask.shape[1])
        if (mask & (positions // length != columns // length)).any():
            warnings.warn(
                f"Padding on the left does not count as positions, which scale queries from {length} on, while transformers "
                "counts it in a forward pass without position_ids, though not in generate. Pad on the right for equal logits "
                'and losses: processor(..., padding_side="right").',
                stacklevel=2,
            )

    def check(self, config: Any) -> None:
        super().check(config)
        side, text = config.spatial_merge_size, config.text_config
        require(side > 1, "spatial_merge_size", side, "must be at least 2. Restore the published value.")
        if text.model_type == "ministral3":
            for field in ("llama_4_scaling_beta", "original_max_position_embeddings"):
                value = text.rope_parameters.get(field)
                fits = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
                require(
                    fits, f"rope_parameters.{field}", value, "must be a number, at least 0. Restore the published one."
                )

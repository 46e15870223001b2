"""Pixtral: config, modules to trace, geometry, tensor names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding

from vlmbuild.families.config_checks import check_heads, check_placeholder, require
from vlmbuild.families.pixtral.prepare import PixtralPrologue
from vlmbuild.families.pixtral.processor import PixtralProcessing
from vlmbuild.families.traced import FeatureCore, embed_patches
from vlmbuild.ir.program import Geometry, Rotary


class _ImageCore(FeatureCore):
    def features(self, pixel_values: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        tower = self.model.vision_tower
        embeds = tower.ln_pre(embed_patches(tower.patch_conv, pixel_values).unsqueeze(0))
        states = tower.transformer(
            embeds,
            attention_mask=None,
            position_embeddings=tower.patch_positional_embedding(embeds, position_ids),
            cu_seq_lens_q=cu_seqlens,
        ).last_hidden_state
        projected: Tensor = self.model.multi_modal_projector(states)
        return projected.squeeze(0)


class Pixtral(PixtralPrologue, PixtralProcessing):
    """`LlavaForConditionalGeneration` with a Pixtral vision tower and a Mistral language model (arXiv:2410.07073)."""

    name = "pixtral"
    title = "Pixtral"
    architectures = ("LlavaForConditionalGeneration",)
    config_class = LlavaConfig
    model_class = LlavaForConditionalGeneration
    image_core = _ImageCore
    vision_prefix = "model.vision_tower."
    projector_prefix = "model.multi_modal_projector."

    def check(self, config: Any) -> None:
        text, vision = config.text_config, config.vision_config
        kinds = f"{vision.model_type} and {text.model_type}"
        require(
            kinds == "pixtral and mistral", "model_type", kinds, "must be pixtral and mistral. Use such a checkpoint."
        )
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        require(layer == -1, "vision_feature_layer", layer, "must be -1: Pixtral uses the last one. Restore it.")
        require(strategy == "full", "vision_feature_select_strategy", strategy, 'must be "full". Restore it.')
        window, dropout, patch = text.sliding_window, vision.attention_dropout, vision.patch_size
        require(window is None, "sliding_window", window, "is not supported. Set it to null.")
        require(not dropout, "vision_config.attention_dropout", dropout, "is not supported. Set it to 0.")
        check_heads("vision_config", vision.hidden_size, vision.num_attention_heads, vision.head_dim, axes=2)
        side = vision.image_size
        require(patch <= side <= 1024 * patch, "image_size", side, f"must be 1 to 1024 patches of {patch}. Restore it.")
        check_placeholder(config.image_token_id, "image_token_index", text.vocab_size)

    def geometry(self, config: Any) -> Geometry:
        text, vision = config.text_config, config.vision_config
        scaling = MistralRotaryEmbedding(text).attention_scaling
        return Geometry(
            rotary=(
                Rotary(text.head_dim, (text.head_dim // 2,), False, scaling),
                Rotary(vision.head_dim, (vision.head_dim // 4,) * 2, shared=False),
            )
        )

    def rotary_modules(self, config: Any) -> dict[str, nn.Module]:
        return {
            "model.vision_tower.patch_positional_embedding": PixtralVisionRotaryEmbedding(config.vision_config),
            "model.language_model.rotary_emb": MistralRotaryEmbedding(config.text_config),
        }

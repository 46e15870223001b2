"""Pixtral: config, modules to trace, geometry, tensor names; the parts for other families with its tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding

from vlmbuild.families.config_checks import check_heads, check_placeholder, require
from vlmbuild.families.gguf import GgufImages, GgufModel
from vlmbuild.families.pixtral import gguf
from vlmbuild.families.pixtral.processor import PixtralProcessing
from vlmbuild.families.traced import FeatureCore, embed_patches
from vlmbuild.ir.program import Geometry, Rotary


class TowerCore(FeatureCore):
    """The traced module of a batch with images, with Pixtral's tower."""

    def features(self, pixel_values: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        tower = self.model.vision_tower
        embeds = tower.ln_pre(embed_patches(tower.patch_conv, pixel_values).unsqueeze(0))
        states = tower.transformer(
            embeds,
            attention_mask=None,
            position_embeddings=tower.patch_positional_embedding(embeds, position_ids),
            cu_seq_lens_q=cu_seqlens,
        ).last_hidden_state
        return self.project(states)

    def project(self, states: Tensor) -> Tensor:
        """Make features of the patches of all images (1, patches, width)."""
        projected: Tensor = self.model.multi_modal_projector(states)
        return projected.squeeze(0)


class PixtralTower(PixtralProcessing):
    """A family with Pixtral's tower and processor, and a language model of Mistral's kinds.

    Attributes:
        text_rotary: Kind of the language model -> its rotary embedding.
    """

    image_core = TowerCore
    vision_prefix = "model.vision_tower."
    projector_prefix = "model.multi_modal_projector."
    text_rotary: Mapping[str, Any] = {"mistral": MistralRotaryEmbedding}

    def check(self, config: Any) -> None:
        text, vision = config.text_config, config.vision_config
        kinds, known = (
            f"{vision.model_type} and {text.model_type}",
            [f"pixtral and {name}" for name in self.text_rotary],
        )
        require(kinds in known, "model_type", kinds, f"must be {' or '.join(known)}. Use such a checkpoint.")
        layer = config.vision_feature_layer
        require(layer == -1, "vision_feature_layer", layer, f"must be -1: {self.title} uses the last one. Restore it.")
        dropout, patch = vision.attention_dropout, vision.patch_size
        require(not dropout, "vision_config.attention_dropout", dropout, "is not supported. Set it to 0.")
        check_heads("vision_config", vision.hidden_size, vision.num_attention_heads, vision.head_dim, axes=2)
        side = vision.image_size
        require(patch <= side <= 1024 * patch, "image_size", side, f"must be 1 to 1024 patches of {patch}. Restore it.")
        check_placeholder(config.image_token_id, "image_token_index", text.vocab_size)

    def geometry(self, config: Any) -> Geometry:
        text, vision = config.text_config, config.vision_config
        scaling = self.text_rotary[text.model_type](text).attention_scaling
        return Geometry(
            rotary=(
                Rotary(text.head_dim, (text.head_dim // 2,), False, scaling),
                Rotary(vision.head_dim, (vision.head_dim // 4,) * 2, shared=False),
            )
        )

    def gguf_images(self, config: Any, processor: Any) -> GgufImages:
        return gguf.images(processor)

    def rotary_modules(self, config: Any) -> dict[str, nn.Module]:
        text = config.text_config
        return {
            "model.vision_tower.patch_positional_embedding": PixtralVisionRotaryEmbedding(config.vision_config),
            "model.language_model.rotary_emb": self.text_rotary[text.model_type](text),
        }


class Pixtral(PixtralTower):
    """`LlavaForConditionalGeneration` with a Pixtral vision tower and a Mistral language model (arXiv:2410.07073)."""

    name = "pixtral"
    title = "Pixtral"
    architectures = ("LlavaForConditionalGeneration",)
    config_class = LlavaConfig
    model_class = LlavaForConditionalGeneration

    def check(self, config: Any) -> None:
        super().check(config)
        strategy = config.vision_feature_select_strategy
        require(strategy == "full", "vision_feature_select_strategy", strategy, 'must be "full". Restore it.')

    def gguf_model(self, config: Any, processor: Any = None) -> GgufModel:
        return gguf.model(config, processor)

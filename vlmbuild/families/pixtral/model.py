"""Pixtral: config, modules to trace, geometry, tensor names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding

from vlmbuild.errors import SourceError
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
    published_prefixes = (
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    )
    vision_prefix = "model.vision_tower."
    projector_prefix = "model.multi_modal_projector."

    def check(self, config: Any) -> None:
        text, vision = config.text_config, config.vision_config
        if vision.model_type != "pixtral" or text.model_type != "mistral":
            raise SourceError(
                f"config.json: a Llava model with a {vision.model_type} vision tower and a {text.model_type} language model "
                "is not supported. Use a checkpoint with a pixtral tower and a mistral model."
            )
        if config.vision_feature_layer != -1 or config.vision_feature_select_strategy != "full":
            raise SourceError(
                "config.json: Pixtral uses all features of the last layer. Set vision_feature_layer to -1 and "
                f'vision_feature_select_strategy to "full", not {config.vision_feature_layer} and '
                f"{config.vision_feature_select_strategy!r}."
            )
        if text.sliding_window is not None:
            raise SourceError("config.json: sliding-window attention is not supported. Set sliding_window to null.")
        if vision.attention_dropout:
            raise SourceError("config.json: attention dropout in the vision tower is not supported. Set it to 0.")
        if not isinstance(vision.patch_size, int):
            raise SourceError(f"config.json: patch_size {vision.patch_size} is not supported. Set it to one number.")

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

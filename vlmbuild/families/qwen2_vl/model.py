"""Qwen2-VL: config, modules to trace, geometry, tensor names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, Qwen2VLVisionRotaryEmbedding

from vlmbuild.families.config_checks import check_heads, check_placeholder, require
from vlmbuild.families.qwen2_vl.processor import Qwen2VLProcessing
from vlmbuild.families.traced import FeatureCore
from vlmbuild.ir.program import Geometry, Rotary


class _ImageCore(FeatureCore):
    def features(self, pixel_values: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        features: Tensor = self.model.visual(
            pixel_values, grid_thw=None, position_ids=position_ids, cu_seqlens=cu_seqlens, max_seqlen=0
        ).pooler_output
        return features


class Qwen2VL(Qwen2VLProcessing):
    """`Qwen2VLForConditionalGeneration` (arXiv:2409.12191), all sizes, images and videos."""

    name = "qwen2_vl"
    title = "Qwen2-VL"
    architectures = ("Qwen2VLForConditionalGeneration",)
    config_class = Qwen2VLConfig
    model_class = Qwen2VLForConditionalGeneration
    rope_class = Qwen2VLModel
    image_core = _ImageCore
    published_prefixes = (("model.visual.", "visual."), ("model.language_model.", "model."))
    vision_prefix = "model.visual."
    projector_prefix = "model.visual.merger."

    def check(self, config: Any) -> None:
        text, vision = config.text_config, config.vision_config
        sections, half = text.rope_parameters.get("mrope_section"), _head_dim(text) // 2
        require(
            isinstance(sections, list) and len(sections) == 3 and sum(sections) == half,
            "mrope_section",
            sections,
            f"must be three numbers, {half} angles in all, half of the head size. Without it positions would silently be "
            "one-dimensional; restore the published rope_scaling entry.",
        )
        full = all(kind == "full_attention" for kind in text.layer_types)
        require(
            full, "use_sliding_window", True, "means sliding-window attention, which is not supported. Set it to false."
        )
        check_heads("vision_config", vision.embed_dim, vision.num_heads, None, axes=2)
        width, hidden = vision.hidden_size, text.hidden_size
        require(
            width == hidden, "vision_config.hidden_size", width, f"must be the text's hidden_size {hidden}. Restore it."
        )
        for field in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            check_placeholder(getattr(config, field), field, text.vocab_size)

    def geometry(self, config: Any) -> Geometry:
        text, vision = config.text_config, config.vision_config
        sections = tuple(text.rope_parameters["mrope_section"])
        scaling = Qwen2VLRotaryEmbedding(text).attention_scaling
        width = vision.embed_dim // vision.num_heads
        return Geometry(
            rotary=(
                Rotary(_head_dim(text), sections, shared=False, scaling=scaling),
                Rotary(width, (width // 4,) * 2, shared=True),
            )
        )

    def rotary_modules(self, config: Any) -> dict[str, nn.Module]:
        return {
            "model.visual.rotary_pos_emb": Qwen2VLVisionRotaryEmbedding(config.vision_config),
            "model.language_model.rotary_emb": Qwen2VLRotaryEmbedding(config.text_config),
        }


def _head_dim(text: Any) -> int:
    return int(text.hidden_size // text.num_attention_heads)

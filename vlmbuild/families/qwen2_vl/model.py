"""Qwen2-VL: config, modules to trace, tensor names."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, Qwen2VLVisionRotaryEmbedding

from vlmbuild.families.config_checks import require
from vlmbuild.families.gguf import GgufModel
from vlmbuild.families.qwen2_vl import gguf
from vlmbuild.families.qwen2_vl.processor import Qwen2VLProcessing
from vlmbuild.families.traced import FeatureCore


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
    text_rotary = Qwen2VLRotaryEmbedding
    vision_rotary = Qwen2VLVisionRotaryEmbedding
    image_core = _ImageCore
    published_prefixes = (("model.visual.", "visual."), ("model.language_model.", "model."))

    def check(self, config: Any) -> None:
        super().check(config)
        width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
        require(
            width == hidden, "vision_config.hidden_size", width, f"must be the text's hidden_size {hidden}. Restore it."
        )

    def gguf_model(self, config: Any, processor: Any = None) -> GgufModel:
        return gguf.model(config)

    def tower_width(self, config: Any) -> int:
        return int(config.vision_config.embed_dim)

"""Qwen2.5-VL: config, modules to trace, tensor names."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLRotaryEmbedding,
    Qwen2_5_VLVisionRotaryEmbedding,
)

from vlmbuild.families.config_checks import require
from vlmbuild.families.gguf import GgufModel
from vlmbuild.families.qwen2_5_vl import gguf
from vlmbuild.families.qwen2_5_vl.prepare import Qwen25VLPrologue, window_side
from vlmbuild.families.traced import FeatureCore


class _ImageCore(FeatureCore):
    """The tower's own forward pass sorts rows into windows and back; here the host has done both."""

    def forward(  # type: ignore[override]  # a variant's inputs are passed by name
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        text_cu_seqlens: Tensor,
        feature_index: Tensor,
        pixel_values: Tensor,
        vision_position_ids: Tensor,
        vision_cu_seqlens: Tensor,
        vision_window_cu_seqlens: Tensor,
    ) -> Tensor:
        visual = self.model.visual
        states = visual.patch_embed(pixel_values)
        angles = visual.rotary_pos_emb(states, vision_position_ids)
        for number, block in enumerate(visual.blocks):
            bounds = vision_cu_seqlens if number in visual.fullatt_block_indexes else vision_window_cu_seqlens
            states = block(states, cu_seqlens=bounds, position_embeddings=angles, max_seqlen=0)
        return self.read(input_ids, position_ids, text_cu_seqlens, feature_index, visual.merger(states))


class Qwen25VL(Qwen25VLPrologue):
    """`Qwen2_5_VLForConditionalGeneration` (arXiv:2502.13923), all sizes, images and videos."""

    name = "qwen2_5_vl"
    title = "Qwen2.5-VL"
    architectures = ("Qwen2_5_VLForConditionalGeneration",)
    config_class = Qwen2_5_VLConfig
    model_class = Qwen2_5_VLForConditionalGeneration
    rope_class = Qwen2_5_VLModel
    text_rotary = Qwen2_5_VLRotaryEmbedding
    vision_rotary = Qwen2_5_VLVisionRotaryEmbedding
    image_core = _ImageCore
    published_prefixes = (("model.visual.", "visual."), ("model.language_model.", "model."))

    def check(self, config: Any) -> None:
        super().check(config)
        vision, hidden = config.vision_config, config.text_config.hidden_size
        width = vision.out_hidden_size
        require(
            width == hidden,
            "out_hidden_size",
            width,
            f"must be the text's hidden_size {hidden}. Restore the published one.",
        )
        smallest = vision.patch_size * vision.spatial_merge_size
        require(
            window_side(vision) >= 1,
            "window_size",
            vision.window_size,
            f"is less than the {smallest} pixels of one feature. Restore the published one.",
        )

    def gguf_model(self, config: Any, processor: Any = None) -> GgufModel:
        return gguf.model(config)

"""Qwen2-VL: config, module to trace, names and roles of parameters, processor. The host prologue is in `_qwen2_vl_host`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, Qwen2VLVisionRotaryEmbedding

from vlmbuild.errors import SourceError
from vlmbuild.families.base import (
    ImageCost,
    InputLayout,
    Names,
    PackedBatch,
    check_text,
    load_processor,
    read_config,
    role_by_prefix,
    text_inputs,
)
from vlmbuild.families.batch import packed_sizes
from vlmbuild.families.core import TextCore, meta_module, place_features
from vlmbuild.families.js import ClientFiles, ClientVision
from vlmbuild.families.qwen2_vl import js as _qwen2_vl_client
from vlmbuild.families.qwen2_vl import processor as _qwen2_vl_processor
from vlmbuild.families.qwen2_vl.prepare import prepare
from vlmbuild.ir.program import COMPUTE_DTYPE, Geometry, Input, Role, Rotary

_NAMES = Names(("model.visual.", "visual."), ("model.language_model.", "model."))


class Qwen2VL:
    """`Qwen2VLForConditionalGeneration` (arXiv:2409.12191), all sizes, images and videos."""

    name = "qwen2_vl"
    title = "Qwen2-VL"
    architectures = ("Qwen2VLForConditionalGeneration",)
    processors = ("Qwen2VLProcessor",)
    resizable_keys = ("shortest_edge", "longest_edge")
    pads_image_batch = False
    extra_embedding_rows = 0
    input_layout: Mapping[str, InputLayout] = {
        "pixel_values": "medium",
        "image_grid_thw": "medium",
        "pixel_values_videos": "medium",
        "video_grid_thw": "medium",
        "mm_token_type_ids": "token",
    }

    def config(self, values: Mapping[str, Any]) -> Qwen2VLConfig:
        config: Qwen2VLConfig = read_config(values, Qwen2VLConfig, _check, "Qwen2-VL")
        return config

    def geometry(self, config: Any) -> Geometry:
        text, vision = config.text_config, config.vision_config
        vision_head_dim = vision.embed_dim // vision.num_heads
        return Geometry(
            rotary=(
                Rotary(
                    _head_dim(config),
                    tuple(text.rope_parameters["mrope_section"]),
                    shared=False,
                    scaling=Qwen2VLRotaryEmbedding(text).attention_scaling,
                ),
                Rotary(vision_head_dim, (vision_head_dim // 4,) * 2, shared=True),
            )
        )

    def variants(self, config: Any) -> dict[str, tuple[Input, ...]]:
        vision = config.vision_config
        patches = f"{vision.spatial_merge_size**2}*merged"
        pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        text = text_inputs(3)
        image = (
            Input("feature_index", torch.int64, (1, "sequence")),
            Input("pixel_values", torch.float32, (patches, pixels)),
            Input("vision_position_ids", torch.int64, (patches, 2)),
            Input("vision_cu_seqlens", torch.int32, ("segments",)),
        )
        return {"image": (*text, *image), "text": text}

    def module(self, config: Any, variant: str, attention: str) -> nn.Module:
        model = meta_module(Qwen2VLForConditionalGeneration, config, attention, COMPUTE_DTYPE)
        return {"image": _ImageCore, "text": TextCore}[variant](model)

    def ties(self, config: Any) -> dict[str, str]:
        tied = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
        return tied if config.tie_word_embeddings else {}

    def constants(self, config: Any) -> dict[str, Tensor]:
        return {
            "model.visual.rotary_pos_emb.inv_freq": Qwen2VLVisionRotaryEmbedding(config.vision_config).inv_freq,
            "model.language_model.rotary_emb.inv_freq": Qwen2VLRotaryEmbedding(config.text_config).inv_freq,
        }

    def role(self, name: str) -> Role:
        return role_by_prefix(name, vision="model.visual.", projector="model.visual.merger.")

    def stored_name(self, name: str) -> str:
        return _NAMES.stored(name)

    def module_name(self, stored: str) -> str:
        return _NAMES.module(stored)

    def prepare(self, batch: Mapping[str, Tensor], config: Any, processor: Any = None) -> PackedBatch:
        return prepare(batch, config, processor)

    def processor(self, directory: Path) -> Any:
        files = "preprocessor_config.json or processor_config.json"
        return load_processor(lambda: _qwen2_vl_processor.load(directory), directory, "Qwen2-VL", files)

    def client_vision(self, config: Any) -> ClientVision | None:
        return _qwen2_vl_client.client_vision(config)

    def client_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        return _qwen2_vl_client.client_batch(batch)

    def client_files(
        self, values: Mapping[str, Any], files: ClientFiles, template: str | None
    ) -> dict[str, Mapping[str, Any]]:
        return _qwen2_vl_client.client_files(values, files, template)

    def media_tokens(self, processor: Any) -> frozenset[int]:
        ends = processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
        return frozenset({processor.image_token_id, processor.video_token_id, *ends})

    def image_tokens(self, processor: Any, height: int, width: int) -> int:
        images = processor.image_processor
        return int(images.get_number_of_image_patches(height, width)) // int(images.merge_size) ** 2

    def image_cost(self, image_processor: Any, config: Any, height: int, width: int) -> ImageCost:
        patches = image_processor.get_number_of_image_patches(height, width)
        return ImageCost(patches, patches // config.vision_config.spatial_merge_size**2)

    def batch_sizes(self, config: Any, images: Sequence[ImageCost], batch: int, text_tokens: int) -> dict[str, int]:
        sizes = packed_sizes(images, batch, text_tokens)
        return sizes | {"merged": sizes["patches"] // config.vision_config.spatial_merge_size**2}


class _ImageCore(TextCore):
    """The traced module of a batch with images or videos."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        text_cu_seqlens: Tensor,
        feature_index: Tensor,
        pixel_values: Tensor,
        vision_position_ids: Tensor,
        vision_cu_seqlens: Tensor,
    ) -> Tensor:
        features = self.model.visual(
            pixel_values, grid_thw=None, position_ids=vision_position_ids, cu_seqlens=vision_cu_seqlens, max_seqlen=0
        ).pooler_output
        embeddings = place_features(self.embed(input_ids), features, feature_index)
        return self.logits(embeddings, position_ids, text_cu_seqlens)


def _head_dim(config: Any) -> int:
    return int(config.text_config.hidden_size // config.text_config.num_attention_heads)


def _check(config: Any) -> None:
    """Refuse what would be captured wrongly."""
    text: Any = config.text_config
    sections = text.rope_parameters.get("mrope_section")
    if not sections or sum(sections) * 2 != _head_dim(config):
        raise SourceError(
            f"config.json: mrope_section {sections} must have {_head_dim(config) // 2} angles in all, half of the head "
            "size. Without it positions would silently be one-dimensional; restore the published rope_scaling entry."
        )
    check_text(text)
    if any(kind != "full_attention" for kind in text.layer_types):
        raise SourceError("config.json: sliding-window attention is not supported; set use_sliding_window to false.")

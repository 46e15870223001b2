"""Pixtral: config, modules to trace, names and roles of parameters, processor. The host prologue is in `_pixtral_host`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.image_utils import ChannelDimension
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size
from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding

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
from vlmbuild.families.core import TextCore, embed_patches, meta_module, place_features
from vlmbuild.families.js import ClientFiles, ClientVision
from vlmbuild.families.pixtral import js as _pixtral_client
from vlmbuild.families.pixtral import processor as _pixtral_processor
from vlmbuild.families.pixtral.prepare import prepare
from vlmbuild.ir.program import COMPUTE_DTYPE, Geometry, Input, Role, Rotary

_NAMES = Names(
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


class Pixtral:
    """`LlavaForConditionalGeneration` with a Pixtral vision tower and a Mistral language model (arXiv:2410.07073)."""

    name = "pixtral"
    title = "Pixtral"
    architectures = ("LlavaForConditionalGeneration",)
    processors = ("PixtralProcessor",)
    resizable_keys = ("longest_edge",)
    pads_image_batch = False
    extra_embedding_rows = 0
    input_layout: Mapping[str, InputLayout] = {"pixel_values": "medium", "image_sizes": "medium"}

    def config(self, values: Mapping[str, Any]) -> LlavaConfig:
        config: LlavaConfig = read_config(values, LlavaConfig, _check, "Pixtral")
        return config

    def geometry(self, config: Any) -> Geometry:
        vision, half = config.vision_config, config.text_config.head_dim // 2
        return Geometry(
            rotary=(
                Rotary(2 * half, (half,), False, MistralRotaryEmbedding(config.text_config).attention_scaling),
                Rotary(vision.head_dim, (vision.head_dim // 4,) * 2, shared=False),
            )
        )

    def variants(self, config: Any) -> dict[str, tuple[Input, ...]]:
        vision = config.vision_config
        text = text_inputs()
        image = (
            Input("feature_index", torch.int64, (1, "sequence")),
            Input("pixel_values", torch.float32, ("patches", vision.num_channels * vision.patch_size**2)),
            Input("vision_position_ids", torch.int64, ("patches", 2)),
            Input("vision_cu_seqlens", torch.int32, ("segments",)),
        )
        return {"image": (*text, *image), "text": text}

    def module(self, config: Any, variant: str, attention: str) -> nn.Module:
        model = meta_module(LlavaForConditionalGeneration, config, attention, COMPUTE_DTYPE)
        return {"image": _ImageCore, "text": TextCore}[variant](model)

    def ties(self, config: Any) -> dict[str, str]:
        tied = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
        return tied if config.tie_word_embeddings else {}

    def constants(self, config: Any) -> dict[str, Tensor]:
        return {
            "model.vision_tower.patch_positional_embedding.inv_freq": PixtralVisionRotaryEmbedding(
                config.vision_config
            ).inv_freq,
            "model.language_model.rotary_emb.inv_freq": MistralRotaryEmbedding(config.text_config).inv_freq,
        }

    def role(self, name: str) -> Role:
        return role_by_prefix(name, vision="model.vision_tower.", projector="model.multi_modal_projector.")

    def stored_name(self, name: str) -> str:
        return _NAMES.stored(name)

    def module_name(self, stored: str) -> str:
        return _NAMES.module(stored)

    def prepare(self, batch: Mapping[str, Tensor], config: Any, processor: Any = None) -> PackedBatch:
        return prepare(batch, config, processor)

    def processor(self, directory: Path) -> Any:
        files = "preprocessor_config.json or processor_config.json"
        return load_processor(lambda: _pixtral_processor.load(directory), directory, "Pixtral", files)

    def client_vision(self, config: Any) -> ClientVision | None:
        return _pixtral_client.client_vision(config)

    def client_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        return _pixtral_client.client_batch(batch)

    def client_files(
        self, values: Mapping[str, Any], files: ClientFiles, template: str | None
    ) -> dict[str, Mapping[str, Any]]:
        return _pixtral_client.client_files(values, files, template)

    def media_tokens(self, processor: Any) -> frozenset[int]:
        return frozenset(processor.image_token_ids)

    def image_tokens(self, processor: Any, height: int, width: int) -> int:
        unit = processor.patch_size * processor.spatial_merge_size
        rows, columns = _rows_and_columns(processor.image_processor, unit, height, width)
        return rows * (columns + 1)

    def image_cost(self, image_processor: Any, config: Any, height: int, width: int) -> ImageCost:
        rows, columns = _rows_and_columns(image_processor, config.vision_config.patch_size, height, width)
        return ImageCost(rows * columns, rows * (columns + 1))  # a break or the end after every row

    def batch_sizes(self, config: Any, images: Sequence[ImageCost], batch: int, text_tokens: int) -> dict[str, int]:
        return packed_sizes(images, batch, text_tokens)


class _ImageCore(TextCore):
    """The traced module of a batch with images, whose patches are packed."""

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
        features = self.features(pixel_values, vision_position_ids, vision_cu_seqlens)
        embeddings = place_features(self.embed(input_ids), features, feature_index)
        return self.logits(embeddings, position_ids, text_cu_seqlens)

    def features(self, pixel_values: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Features (patches, hidden) of packed patches (patches, pixels)."""
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


def _rows_and_columns(image_processor: Any, patch: int, height: int, width: int) -> tuple[int, int]:
    """Of the patches of an image, once it is resized."""
    edge = image_processor.size["longest_edge"]
    image = np.broadcast_to(np.uint8(0), (height, width, 3))  # only its shape is read; this one takes no memory
    sides = get_resize_output_image_size(image, (edge, edge), (patch, patch), ChannelDimension.LAST)
    rows, columns = (int(side) // patch for side in sides)
    if not rows or not columns:
        raise ValueError(f"scaled down to an edge of {edge} pixels, nothing is left of it")
    return rows, columns


def _check(config: Any) -> None:
    """Refuse what would be captured wrongly."""
    text, vision = config.text_config, config.vision_config
    if vision.model_type != "pixtral" or text.model_type != "mistral":
        raise SourceError(
            f"config.json: a Llava model with a {vision.model_type} vision tower and a {text.model_type} language model is "
            "not supported; vlmbuild builds those of pixtral and mistral."
        )
    if config.vision_feature_layer != -1 or config.vision_feature_select_strategy != "full":
        raise SourceError(
            "config.json: Pixtral's features are the last layer's, whole: vision_feature_layer must be -1 and "
            f'vision_feature_select_strategy "full", not {config.vision_feature_layer} and '
            f"{config.vision_feature_select_strategy!r}."
        )
    check_text(text)
    if text.sliding_window is not None:
        raise SourceError("config.json: sliding-window attention is not supported; set sliding_window to null.")
    if vision.attention_dropout:
        raise SourceError("config.json: attention dropout in the vision tower is not supported; set it to 0.")
    if not isinstance(vision.patch_size, int):
        raise SourceError(f"config.json: patch_size must be one number, not {vision.patch_size}.")

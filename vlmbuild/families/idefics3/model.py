"""Idefics3 and SmolVLM: config, modules to trace, geometry, tensor names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vlmbuild.families.config_checks import check_heads, check_placeholder, require
from vlmbuild.families.gguf import GgufImages, GgufModel
from vlmbuild.families.idefics3 import gguf
from vlmbuild.families.idefics3.processor import Idefics3Processing, SmolVLMProcessing
from vlmbuild.families.tiles import TileCore, TileLayout
from vlmbuild.families.traced import embed_patches
from vlmbuild.ir.program import Geometry, Rotary

_POSITIONS = "position_ids"


class _ImageCore(TileCore):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        embeddings = self.model.vision_model.embeddings
        positions = torch.empty(embeddings.num_positions, dtype=torch.int64, device="meta")
        embeddings.register_buffer(_POSITIONS, positions, persistent=False)  # transformers computes them from the mask

    def features(self, pixel_values: Tensor) -> Tensor:
        tower = self.model.vision_model
        embeddings, width = tower.embeddings, tower.embeddings.embed_dim
        states = embed_patches(embeddings.patch_embedding, pixel_values).view(-1, embeddings.num_positions, width)
        states = states + embeddings.position_embedding(embeddings.position_ids)
        states = tower.post_layernorm(tower.encoder(states).last_hidden_state)
        connector = self.model.connector
        # Patches are in the order of blocks, so that transformers' pixel shuffle is a view.
        shuffled = states.reshape(-1, width * connector.scale_factor**2)
        features: Tensor = connector.modality_projection(shuffled)
        return features


class Idefics3(Idefics3Processing):
    """`Idefics3ForConditionalGeneration`: a SigLIP tower, a pixel shuffle and a Llama (arXiv:2408.12637)."""

    name = "idefics3"
    title = "Idefics3"
    architectures = ("Idefics3ForConditionalGeneration",)
    config_class: Any = Idefics3Config
    model_class: Any = Idefics3ForConditionalGeneration
    image_core = _ImageCore
    vision_prefix = "model.vision_model."
    projector_prefix = "model.connector."
    language_prefix = "model.text_model."
    published_prefixes = ()

    def tile(self, config: Any) -> TileLayout:
        vision = config.vision_config
        return TileLayout(vision.num_channels, vision.image_size, vision.patch_size, config.scale_factor)

    def check(self, config: Any) -> None:
        text, vision = config.text_config, config.vision_config
        require(text.model_type == "llama", "model_type", text.model_type, "must be llama. Use such a checkpoint.")
        for field in ("image_size", "patch_size"):
            side = getattr(vision, field)
            require(isinstance(side, int), field, side, "must be one number: tiles are squares. Restore it.")
        dropout = vision.attention_dropout
        require(not dropout, "vision_config.attention_dropout", dropout, "is not supported. Set it to 0.")
        check_heads("vision_config", vision.hidden_size, vision.num_attention_heads, None, axes=0)
        side, patch, scale = vision.image_size, vision.patch_size, config.scale_factor
        rows = side // patch
        require(1 <= rows <= 1024, "image_size", side, f"must be 1 to 1024 patches of patch_size {patch}. Restore it.")
        require(
            rows % scale == 0, "scale_factor", scale, f"must divide the {rows} rows of patches of a tile. Restore it."
        )
        check_placeholder(config.image_token_id, "image_token_id", text.vocab_size)

    def geometry(self, config: Any) -> Geometry:
        text = config.text_config
        scaling = LlamaRotaryEmbedding(text).attention_scaling
        return Geometry(rotary=(Rotary(text.head_dim, (text.head_dim // 2,), False, scaling),))

    def rotary_modules(self, config: Any) -> dict[str, nn.Module]:
        return {"model.text_model.rotary_emb": LlamaRotaryEmbedding(config.text_config)}

    def constants(self, config: Any) -> dict[str, Tensor]:
        positions = self.tile(config).in_blocks(position_ids(self.tile(config).rows))
        return {**super().constants(config), f"{self.vision_prefix}embeddings.{_POSITIONS}": positions}

    def gguf_model(self, config: Any, processor: Any = None) -> GgufModel:
        return gguf.model(config)

    def gguf_images(self, config: Any, processor: Any) -> GgufImages:
        return gguf.images(processor)

    def client_names(self, module: str) -> tuple[str, ...]:
        return (module,)  # as published, and vLLM's


class SmolVLM(SmolVLMProcessing, Idefics3):
    """`SmolVLMForConditionalGeneration`: SmolVLM2 (arXiv:2504.05299), the same model with small language models."""

    name = "smolvlm"
    title = "SmolVLM2"
    architectures = ("SmolVLMForConditionalGeneration",)
    config_class = SmolVLMConfig
    model_class = SmolVLMForConditionalGeneration


def position_ids(rows: int) -> Tensor:
    """Number the positions of a whole tile's patches, row by row, as transformers does.

    It puts fractions of the side into buckets; in float32 some fall into the one before.
    """
    edges = torch.arange(1 / rows, 1.0, 1 / rows)
    fractions = (torch.arange(rows, dtype=torch.float32) * (1.0 / torch.tensor(rows))).clamp(max=1.0 - 1e-6)
    buckets = torch.bucketize(fractions, edges, right=True)
    return (buckets[:, None] * rows + buckets).flatten()

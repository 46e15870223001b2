"""Llama 3.2 Vision: config, modules to trace, names and roles of parameters, processor. Host prologue: `_mllama_host`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor
from transformers.models.mllama.modeling_mllama import MllamaRotaryEmbedding
from transformers.utils.import_utils import is_torchvision_available

from vlmbuild.errors import SourceError
from vlmbuild.families.base import (
    ImageCost,
    InputLayout,
    KeyGroups,
    Names,
    PackedBatch,
    check_text,
    load_processor,
    read_config,
    role_by_prefix,
    text_inputs,
)
from vlmbuild.families.batch import packed_sizes
from vlmbuild.families.core import TextCore, embed_patches, meta_module
from vlmbuild.families.js import ClientFiles, ClientVision, with_template
from vlmbuild.families.mllama.prepare import padded_patches, patches_per_tile, prepare
from vlmbuild.ir.program import COMPUTE_DTYPE, Geometry, Input, Role, Rotary

_NAMES = Names(
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


class Mllama:
    """`MllamaForConditionalGeneration`: a Llama 3 whose cross-attention layers read tiles of images (arXiv:2407.21783, 7)."""

    name = "mllama"
    title = "Llama 3.2 Vision"
    architectures = ("MllamaForConditionalGeneration",)
    processors = ("MllamaProcessor",)
    resizable_keys = ()  # the size of a tile is the model's
    pads_image_batch = True
    extra_embedding_rows = 8
    input_layout: Mapping[str, InputLayout] = {
        "pixel_values": "sample",
        "aspect_ratio_ids": "sample",
        "aspect_ratio_mask": "sample",
        "cross_attention_mask": "token",
    }

    def config(self, values: Mapping[str, Any]) -> MllamaConfig:
        config: MllamaConfig = read_config(values, MllamaConfig, _check, "Llama 3.2 Vision")
        return config

    def geometry(self, config: Any) -> Geometry:
        half = config.text_config.hidden_size // config.text_config.num_attention_heads // 2
        scaling = MllamaRotaryEmbedding(config.text_config).attention_scaling
        return Geometry(rotary=(Rotary(2 * half, (half,), False, scaling),))

    def variants(self, config: Any) -> dict[str, tuple[Input, ...]]:
        vision = config.vision_config
        tiles, pixels = vision.max_num_tiles, vision.num_channels * vision.patch_size**2
        rows, features = tiles * padded_patches(vision), tiles * patches_per_tile(vision)
        patches = features - tiles  # without class embeddings
        text = text_inputs()
        image = (
            Input("pixel_values", torch.float32, (f"{patches}*images", pixels)),
            Input("tile_ids", torch.int64, (f"{tiles}*images",)),
            Input("patch_groups", torch.int32, (f"{rows}*images",)),
            Input("visible_patches", torch.bool, (f"{rows}*images", "2*images")),
            Input("feature_groups", torch.int32, (f"{features}*images",)),
            Input("visible_tiles", torch.bool, ("sequence", f"{tiles}*images")),
            Input("sees_image", torch.bool, ("sequence",)),
        )
        return {"image": (*text, *image), "text": text}

    def module(self, config: Any, variant: str, attention: str) -> nn.Module:
        model = meta_module(MllamaForConditionalGeneration, config, attention, COMPUTE_DTYPE)
        return {"image": _ImageCore, "text": TextCore}[variant](model)

    def ties(self, config: Any) -> dict[str, str]:
        return {}  # the embeddings have eight rows more than the head

    def constants(self, config: Any) -> dict[str, Tensor]:
        return {"model.language_model.rotary_emb.inv_freq": MllamaRotaryEmbedding(config.text_config).inv_freq}

    def role(self, name: str) -> Role:
        return role_by_prefix(name, vision="model.vision_model.", projector="model.multi_modal_projector.")

    def stored_name(self, name: str) -> str:
        return _NAMES.stored(name)

    def module_name(self, stored: str) -> str:
        return _NAMES.module(stored)

    def prepare(self, batch: Mapping[str, Tensor], config: Any, processor: Any = None) -> PackedBatch:
        return prepare(batch, config)

    def processor(self, directory: Path) -> Any:
        backend: dict[str, Any] = {} if is_torchvision_available() else {"backend": "pil"}

        def load() -> Any:
            return MllamaProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **backend)

        return load_processor(load, directory, "Llama 3.2 Vision", "preprocessor_config.json or processor_config.json")

    def client_vision(self, config: Any) -> ClientVision | None:
        return None

    def client_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        return None

    def client_files(
        self, values: Mapping[str, Any], files: ClientFiles, template: str | None
    ) -> dict[str, Mapping[str, Any]]:
        return {"config.json": values, "tokenizer_config.json": with_template(files, template)}

    def media_tokens(self, processor: Any) -> frozenset[int]:
        return frozenset({int(processor.image_token_id)})

    def image_tokens(self, processor: Any, height: int, width: int) -> int:
        return 1

    def image_cost(self, image_processor: Any, config: Any, height: int, width: int) -> ImageCost:
        vision = config.vision_config
        tiles = vision.max_num_tiles  # padded tiles are computed and seen like the others
        return ImageCost(tiles * padded_patches(vision), 1, tiles * patches_per_tile(vision))

    def batch_sizes(self, config: Any, images: Sequence[ImageCost], batch: int, text_tokens: int) -> dict[str, int]:
        return packed_sizes(images, batch, text_tokens) | {"images": batch * len(images)}


class _ImageCore(TextCore):
    """The traced module of a batch with images: the tiles of all of them in one row."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        text_cu_seqlens: Tensor,
        pixel_values: Tensor,
        tile_ids: Tensor,
        patch_groups: Tensor,
        visible_patches: Tensor,
        feature_groups: Tensor,
        visible_tiles: Tensor,
        sees_image: Tensor,
    ) -> Tensor:
        features = self.features(pixel_values, tile_ids, KeyGroups(patch_groups, visible_patches))
        embeddings = self.embed(input_ids)
        return self.logits(
            embeddings,
            position_ids,
            text_cu_seqlens,
            cross_attention_states=self.model.multi_modal_projector(features),
            cross_attention_mask=KeyGroups(feature_groups, visible_tiles),
            full_text_row_masked_out_mask=sees_image.to(embeddings.dtype)[None, None, :, None],
        )

    def features(self, pixel_values: Tensor, tile_ids: Tensor, groups: KeyGroups) -> Tensor:
        """Features (1, tiles * patches, width) of the patches of tiles (tiles * (patches - 1), pixels).

        The vision model's own layers, with the tiles of all images in one row where it has a batch of images, and embeddings
        looked up per tile (`tile_ids`: aspect ratio id * tiles + place) where it looks them up per image.
        """
        vision = self.model.vision_model
        states = self._embed_tiles(pixel_values, tile_ids)
        patches, rows, width = vision.num_patches, padded_patches(vision.config), vision.hidden_size
        fill = states.new_zeros(tile_ids.shape[0], rows - patches, width)
        states = torch.cat([states, fill], dim=1).reshape(1, -1, width)
        local = vision.transformer(states, attention_mask=groups)
        states = vision.layernorm_post(local.last_hidden_state).view(-1, rows, width)
        states = states + _tile_embedding(vision.post_tile_positional_embedding, tile_ids)
        states = vision.global_transformer(states.reshape(1, -1, width), attention_mask=groups).last_hidden_state
        chosen = [local.hidden_states[index] for index in vision.intermediate_layers_indices]
        inner = torch.stack(chosen, dim=-1).view(-1, rows, width * len(chosen))
        features = torch.cat([states.view(-1, rows, width), inner], dim=-1)[:, :patches]
        return features.reshape(1, -1, features.shape[-1])

    def _embed_tiles(self, pixel_values: Tensor, tile_ids: Tensor) -> Tensor:
        """Patch, tile and position embeddings: (tiles, patches + 1, width)."""
        vision = self.model.vision_model
        states = embed_patches(vision.patch_embedding, pixel_values).view(
            -1, vision.num_patches - 1, vision.hidden_size
        )
        states = states + _tile_embedding(vision.pre_tile_positional_embedding, tile_ids)
        first = vision.class_embedding.expand(tile_ids.shape[0], 1, -1)
        states = torch.cat([first, states], dim=1)
        position = vision.gated_positional_embedding
        gate = position.gate.tanh()
        states = states + (1 - gate) * position.embedding
        of_tiles = position.tile_embedding.weight.view(-1, *position.embedding.shape)
        embedded: Tensor = vision.layernorm_pre(states + gate * of_tiles[tile_ids])
        return embedded


def _tile_embedding(embedding: Any, tile_ids: Tensor) -> Tensor:
    """The gated embedding of every tile's place: (tiles, 1, width)."""
    of_tiles = embedding.embedding.weight.view(-1, 1, embedding.hidden_size)
    gated: Tensor = of_tiles[tile_ids] * embedding.gate.tanh()
    return gated


def _check(config: Any) -> None:
    """Refuse what would be captured wrongly."""
    text, vision = config.text_config, config.vision_config
    check_text(text)
    layers = text.cross_attention_layers
    if not layers or not set(layers) < set(range(text.num_hidden_layers)):
        raise SourceError(
            f"config.json: cross_attention_layers {layers} must name some, not all, of the {text.num_hidden_layers} layers."
        )
    if config.image_token_id < text.vocab_size:
        raise SourceError(
            f"config.json: image_token_index {config.image_token_id} lies within the vocabulary of {text.vocab_size}; the "
            "image token comes after it, where the head cannot write it."
        )
    if vision.image_size % vision.patch_size:
        raise SourceError(
            f"config.json: image_size {vision.image_size} is not a multiple of patch_size {vision.patch_size}."
        )
    if not all(0 <= index < vision.num_hidden_layers for index in vision.intermediate_layers_indices):
        raise SourceError(
            f"config.json: intermediate_layers_indices {vision.intermediate_layers_indices} must name some of the "
            f"{vision.num_hidden_layers} local layers."
        )
    width = vision.hidden_size * (len(vision.intermediate_layers_indices) + 1)
    if vision.vision_output_dim != width:
        raise SourceError(
            f"config.json: vision_output_dim is {vision.vision_output_dim}, but the last state and "
            f"{len(vision.intermediate_layers_indices)} intermediate ones of width {vision.hidden_size} make {width}."
        )

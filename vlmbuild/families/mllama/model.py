"""Llama 3.2 Vision: config, modules to trace, geometry, tensor names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor
from transformers.models.mllama.modeling_mllama import MllamaRotaryEmbedding
from transformers.utils.import_utils import is_torchvision_available

from vlmbuild.families.config_checks import check_heads, require
from vlmbuild.families.mllama.prepare import MllamaPrologue, padded_patches
from vlmbuild.families.traced import KeyGroups, TextCore, embed_patches
from vlmbuild.ir.program import Geometry, Rotary


class _ImageCore(TextCore):
    """The traced module of a batch with images: the tiles of all images in one row."""

    def forward(  # type: ignore[override]  # a variant's inputs are passed by name
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
        """Run the vision model: patches of tiles (tiles * (patches - 1), pixels) -> (1, tiles * patches, width).

        The vision model's own layers run, but on the tiles of all images in one row instead of a batch of images, and with
        embeddings per tile (`tile_ids`: aspect ratio id * tiles + index of the tile) instead of per image.
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
        """Add patch, tile and position embeddings: (tiles, patches + 1, width)."""
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
        table = position.tile_embedding.weight.view(-1, *position.embedding.shape)
        embedded: Tensor = vision.layernorm_pre(states + gate * table[tile_ids])
        return embedded


def _tile_embedding(embedding: Any, tile_ids: Tensor) -> Tensor:
    """Look up the gated embedding of every tile: (tiles, 1, width)."""
    table = embedding.embedding.weight.view(-1, 1, embedding.hidden_size)
    gated: Tensor = table[tile_ids] * embedding.gate.tanh()
    return gated


class Mllama(MllamaPrologue):
    """`MllamaForConditionalGeneration`: a Llama 3 whose cross-attention layers read tiles of images (arXiv:2407.21783, 7)."""

    name = "mllama"
    title = "Llama 3.2 Vision"
    architectures = ("MllamaForConditionalGeneration",)
    config_class = MllamaConfig
    model_class = MllamaForConditionalGeneration
    image_core = _ImageCore
    processors = ("MllamaProcessor",)
    vision_prefix = "model.vision_model."
    no_gguf = "llama.cpp has no mllama, whose layers read images by cross-attention"
    projector_prefix = "model.multi_modal_projector."
    extra_embedding_rows = 8

    def check(self, config: Any) -> None:
        text, vision = config.text_config, config.vision_config
        layers, count = text.cross_attention_layers, text.num_hidden_layers
        known = bool(layers) and set(layers) < set(range(count))
        require(
            known, "cross_attention_layers", layers, f"must name some, not all, of {count} layers. Restore the list."
        )
        image, rows = config.image_token_id, text.vocab_size
        require(
            rows <= image < rows + self.extra_embedding_rows,
            "image_token_index",
            image,
            f"must be one of the {self.extra_embedding_rows} ids after the vocabulary of {rows}. Restore it.",
        )
        check_heads("vision_config", vision.hidden_size, vision.attention_heads, None, axes=0)
        side, patch = vision.image_size, vision.patch_size
        require(side % patch == 0, "image_size", side, f"is not a multiple of patch_size {patch}. Restore them.")
        chosen, depth = vision.intermediate_layers_indices, vision.num_hidden_layers
        known = all(0 <= index < depth for index in chosen)
        require(
            known, "intermediate_layers_indices", chosen, f"must name some of the {depth} local layers. Restore it."
        )
        width, output = vision.hidden_size * (len(chosen) + 1), vision.vision_output_dim
        require(
            output == width,
            "vision_output_dim",
            output,
            f"must be {width}: the last state and {len(chosen)} intermediate ones of {vision.hidden_size}. Set it to that.",
        )
        ratios, tiles = vision.supported_aspect_ratios, vision.max_num_tiles
        fit = all(len(ratio) == 2 and min(ratio) >= 1 and ratio[0] * ratio[1] <= tiles for ratio in ratios)
        require(fit, "supported_aspect_ratios", ratios, f"must be pairs of at most {tiles} tiles. Restore the list.")

    def geometry(self, config: Any) -> Geometry:
        half = config.text_config.hidden_size // config.text_config.num_attention_heads // 2
        scaling = MllamaRotaryEmbedding(config.text_config).attention_scaling
        return Geometry(rotary=(Rotary(2 * half, (half,), False, scaling),))

    def rotary_modules(self, config: Any) -> dict[str, nn.Module]:
        return {"model.language_model.rotary_emb": MllamaRotaryEmbedding(config.text_config)}

    def load_processor(self, directory: Path) -> Any:
        backend: dict[str, Any] = {} if is_torchvision_available() else {"backend": "pil"}
        return MllamaProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **backend)

    def processor_pixels(self, image_processor: Any) -> int:
        size = image_processor.size
        return int(size["height"] * size["width"] * image_processor.max_image_tiles)

    def media_tokens(self, processor: Any) -> frozenset[int]:
        return frozenset({int(processor.image_token_id)})

    def image_tokens(self, processor: Any, height: int, width: int) -> int:
        return 1

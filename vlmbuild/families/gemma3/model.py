"""Gemma 3: config, modules to trace, geometry, tensor names."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from vlmbuild.families.config_checks import check_heads, check_placeholder, require
from vlmbuild.families.gemma3 import gguf
from vlmbuild.families.gemma3.prepare import Gemma3Prologue
from vlmbuild.families.gguf import GgufImages, GgufModel
from vlmbuild.families.tiles import TileLayout
from vlmbuild.families.traced import FeatureCore, Segments, TextCore, embed_patches
from vlmbuild.ir.program import Geometry, Role, Rotary

_SCALE = "embed_scale"
_LAYERS = ("full_attention", "sliding_attention")


class _TextCore(TextCore):
    def forward(  # type: ignore[override]  # a variant's inputs are passed by name
        self, input_ids: Tensor, position_ids: Tensor, text_cu_seqlens: Tensor, lookahead: Tensor
    ) -> Tensor:
        return self.logits(self.embed(input_ids), position_ids, text_cu_seqlens, lookahead=lookahead)

    def logits(self, embeddings: Tensor, position_ids: Tensor, text_cu_seqlens: Tensor, **layers: Any) -> Tensor:
        """Run the language model, with its two tables of angles in one order; transformers goes through a set."""
        language = self.model.language_model
        kinds = sorted(set(language.config.layer_types))
        angles = {kind: language.rotary_emb(embeddings, position_ids, kind) for kind in kinds}
        hidden = embeddings
        for layer in language.layers:
            hidden = layer(
                hidden, position_embeddings=angles[layer.self_attn.layer_type], cu_seq_lens_q=text_cu_seqlens, **layers
            )
        logits: Tensor = self.lm_head(language.norm(hidden))
        return logits


class _ImageCore(_TextCore, FeatureCore):
    def forward(  # type: ignore[override]  # as above
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        text_cu_seqlens: Tensor,
        feature_index: Tensor,
        pixel_values: Tensor,
        vision_position_ids: Tensor,
        vision_cu_seqlens: Tensor,
        lookahead: Tensor,
    ) -> Tensor:
        features = self.features(pixel_values, vision_position_ids, vision_cu_seqlens)
        return self.read(input_ids, position_ids, text_cu_seqlens, feature_index, features, lookahead=lookahead)

    def features(self, pixel_values: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        tower, projector = self.model.vision_tower, self.model.multi_modal_projector
        embeddings = tower.embeddings
        states = embed_patches(embeddings.patch_embedding, pixel_values) + embeddings.position_embedding(position_ids)
        states = tower.encoder(states.unsqueeze(0), attention_mask=Segments(cu_seqlens)).last_hidden_state
        states = tower.post_layernorm(states)
        # The patches of a square lie in a row, so that transformers' pooling is a mean.
        pooled = states.reshape(-1, projector.kernel_size**2, states.shape[-1]).mean(1)
        return torch.matmul(projector.mm_soft_emb_norm(pooled), projector.mm_input_projection_weight)


class Gemma3(Gemma3Prologue):
    """`Gemma3ForConditionalGeneration` (arXiv:2503.19786): a SigLIP tower, and layers with sliding windows among full ones."""

    name = "gemma3"
    title = "Gemma 3"
    architectures = ("Gemma3ForConditionalGeneration",)
    config_class: Any = Gemma3Config
    model_class: Any = Gemma3ForConditionalGeneration
    image_core = _ImageCore
    text_core = _TextCore
    vision_prefix = "model.vision_tower."
    projector_prefix = "model.multi_modal_projector."

    def tile(self, config: Any) -> TileLayout:
        vision = config.vision_config
        rows, side = vision.image_size // vision.patch_size, math.isqrt(config.mm_tokens_per_image)
        return TileLayout(vision.num_channels, vision.image_size, vision.patch_size, rows // side)

    def check(self, config: Any) -> None:
        text, vision = config.text_config, config.vision_config
        kinds = f"{vision.model_type} and {text.model_type}"
        known = "siglip_vision_model and gemma3_text"
        require(kinds == known, "model_type", kinds, f"must be {known}. Use such a checkpoint.")
        for field in ("use_bidirectional_attention", "attn_logit_softcapping", "final_logit_softcapping"):
            value = getattr(text, field)
            require(
                not value, f"text_config.{field}", value, "is not supported. Set it to null, as published configs do."
            )
        kinds, window = text.layer_types, text.sliding_window
        fits = len(kinds) == text.num_hidden_layers and set(kinds) <= set(_LAYERS)
        require(
            fits, "layer_types", kinds, f"must be {' or '.join(_LAYERS)} for each layer. Restore the published list."
        )
        require(isinstance(window, int), "sliding_window", window, "must be a number of tokens. Restore it.")
        dropout, head = vision.attention_dropout, vision.vision_use_head
        require(not dropout, "vision_config.attention_dropout", dropout, "is not supported. Set it to 0.")
        require(
            not head,
            "vision_use_head",
            head,
            "must be false: no image reads the head. Set it, as published configs do.",
        )
        check_heads("vision_config", vision.hidden_size, vision.num_attention_heads, None, axes=0)
        patch, side, tokens = vision.patch_size, vision.image_size, config.mm_tokens_per_image
        rows, columns = side // patch, math.isqrt(tokens)
        require(1 <= rows <= 1024, "image_size", side, f"must be 1 to 1024 patches of patch_size {patch}. Restore it.")
        square = columns**2 == tokens and rows % columns == 0
        fault = f"must be the square of a number that divides the {rows} rows of patches. Restore the published value."
        require(square, "mm_tokens_per_image", tokens, fault)
        check_placeholder(config.image_token_id, "image_token_index", text.vocab_size)

    def geometry(self, config: Any) -> Geometry:
        text, rotary = config.text_config, Gemma3RotaryEmbedding(config.text_config)
        scales = dict.fromkeys(getattr(rotary, f"{kind}_attention_scaling") for kind in sorted(set(text.layer_types)))
        return Geometry(rotary=tuple(Rotary(text.head_dim, (text.head_dim // 2,), False, scale) for scale in scales))

    def rotary_modules(self, config: Any) -> dict[str, nn.Module]:
        return {f"{self.language_prefix}rotary_emb": Gemma3RotaryEmbedding(config.text_config)}

    def constants(self, config: Any) -> dict[str, Tensor]:
        scale = torch.tensor(config.text_config.hidden_size**0.5)
        return {**super().constants(config), f"{self.language_prefix}embed_tokens.{_SCALE}": scale}

    def role(self, name: str) -> Role:
        return "language" if name.endswith(_SCALE) else super().role(name)

    def gguf_model(self, config: Any, processor: Any = None) -> GgufModel:
        return gguf.model(config, self.tile(config).merge)

    def gguf_images(self, config: Any, processor: Any) -> GgufImages:
        return gguf.images(processor)

    @property
    def published_prefixes(self) -> tuple[tuple[str, str], ...]:
        return (("model.vision_tower.", "vision_tower.vision_model."), *super().published_prefixes)

    def module_name(self, stored: str) -> str:
        return super().module_name(stored).replace("vision_tower.vision_model.", "vision_tower.", 1)

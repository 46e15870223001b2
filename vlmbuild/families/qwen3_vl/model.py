"""Qwen3-VL: config, modules to trace, geometry."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding, Qwen3VLVisionRotaryEmbedding

from vlmbuild.families.config_checks import require
from vlmbuild.families.gguf import GgufModel
from vlmbuild.families.qwen3_vl import gguf
from vlmbuild.families.qwen3_vl.prepare import Qwen3VLPrologue
from vlmbuild.families.traced import TextCore
from vlmbuild.ir.program import Role
from vlmbuild.ops.rope.op import interleave, last_turn


class _ImageCore(TextCore):
    """The traced module of a batch with images. A feature is as wide as several embeddings: the first takes the place of the
    token's, and DeepStack (arXiv:2406.04334) adds one of the others behind each of the first layers."""

    def forward(  # type: ignore[override]  # a variant's inputs are passed by name
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        text_cu_seqlens: Tensor,
        feature_index: Tensor,
        pixel_values: Tensor,
        vision_position_ids: Tensor,
        vision_cu_seqlens: Tensor,
        grid_indices: Tensor,
        grid_weights: Tensor,
    ) -> Tensor:
        encoded = self.model.visual(
            pixel_values,
            grid_thw=None,
            position_ids=vision_position_ids,
            cu_seqlens=vision_cu_seqlens,
            max_seqlen=0,
            interp_indices=grid_indices,
            interp_weights=grid_weights,
        )
        features = torch.cat([encoded.pooler_output, *encoded.deepstack_features], dim=-1)
        embeddings, shown = self.embed(input_ids), (feature_index >= 0).unsqueeze(-1)
        rows = features[feature_index.clamp(min=0)].to(embeddings.dtype)  # row 0 where it is not used
        width = embeddings.shape[-1]
        first, *others = rows.split_with_sizes([width] * (features.shape[-1] // width), dim=-1)
        added = [torch.where(shown, other, rows.new_zeros(1)) for other in others]
        embeddings = torch.where(shown, first, embeddings)
        return self.logits(embeddings, position_ids, text_cu_seqlens, deepstack_visual_embeds=added)


class Qwen3VL(Qwen3VLPrologue):
    """`Qwen3VLForConditionalGeneration` (arXiv:2511.21631), all dense sizes, images and videos."""

    name = "qwen3_vl"
    title = "Qwen3-VL"
    architectures = ("Qwen3VLForConditionalGeneration",)
    refused_architectures = (
        ("Qwen3VLMoeForConditionalGeneration", "layers of experts (MoE) are not supported. Use a dense Qwen3-VL"),
    )
    config_class = Qwen3VLConfig
    model_class = Qwen3VLForConditionalGeneration
    rope_class = Qwen3VLModel
    text_rotary = Qwen3VLTextRotaryEmbedding
    vision_rotary = Qwen3VLVisionRotaryEmbedding
    interleaved = True
    image_core = _ImageCore
    published_prefixes = ()

    def check(self, config: Any) -> None:
        super().check(config)
        text, vision = config.text_config, config.vision_config
        sections, half = text.rope_parameters["mrope_section"], text.head_dim // 2
        require(
            min(sections) >= 1 and last_turn(sections) < half,
            "mrope_section",
            sections,
            f"must let three axes take turns in {half} angles. Restore the published rope_scaling entry.",
        )
        turns = text.rope_parameters.get("mrope_interleaved", True)
        require(
            turns is True, "mrope_interleaved", turns, "is not how this model is computed. Restore the published value."
        )
        width, hidden, rows = vision.out_hidden_size, text.hidden_size, vision.num_position_embeddings
        require(width == hidden, "out_hidden_size", width, f"must be the text's hidden_size {hidden}. Restore it.")
        side = int(rows**0.5)
        require(side**2 == rows, "num_position_embeddings", rows, "must be a square. Restore the published value.")
        chosen, depth, layers = list(vision.deepstack_visual_indexes), vision.depth, text.num_hidden_layers
        known = chosen == sorted(set(chosen)) and set(chosen) <= set(range(depth)) and len(chosen) <= layers
        require(
            known,
            "deepstack_visual_indexes",
            chosen,
            f"must name some of {depth} vision blocks, in order, and no more than the {layers} text layers. Restore the list.",
        )

    def gguf_model(self, config: Any, processor: Any = None) -> GgufModel:
        return gguf.model(config)

    def client_names(self, module: str) -> tuple[str, ...]:
        return *super().client_names(module), module.removeprefix("model.")  # vLLM's tower is `visual`

    def role(self, name: str) -> Role:
        return "projector" if name.startswith("model.visual.deepstack_merger_list.") else super().role(name)

    def module(self, config: Any, variant: str, attention: str) -> nn.Module:
        """Construct the module to trace; two of its methods, which write in place or by a mask, get equal ones that do not."""
        core = super().module(config, variant, attention)
        text: Any = core.get_submodule("model.language_model")
        text.rotary_emb.recomposition_frequencies = partial(_both_halves, sections=tuple(text.rotary_emb.mrope_section))
        text._deepstack_process = _add_rows
        return core


def _both_halves(table: Tensor, sections: tuple[int, ...]) -> Tensor:
    half = interleave(table, sections)
    return torch.cat((half, half), dim=-1)


def _add_rows(states: Tensor, _mask: None, rows: Tensor) -> Tensor:
    """Add rows that are zero for text."""
    return states + rows

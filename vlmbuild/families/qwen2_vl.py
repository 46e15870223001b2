"""Qwen2-VL: config, module to trace, names and roles of parameters, processor. The host prologue is in `_qwen2_vl_host`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, Qwen2VLVisionRotaryEmbedding
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.utils.import_utils import is_torchvision_available

from vlmbuild.errors import SourceError
from vlmbuild.families._family import HostBatch, meta_module
from vlmbuild.families._qwen2_vl_host import prepare
from vlmbuild.program import COMPUTE_DTYPE, Geometry, Input, Role, Rotary

_STATIC_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_IGNORED_CONFIG_KEYS = ("auto_map", "trust_remote_code", "_attn_implementation", "attn_implementation")


class ImageTextProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor for images and text only: its video processor needs torchvision, which may be missing."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call]


ImageTextProcessor.__name__ = Qwen2VLProcessor.__name__  # what `save_pretrained` writes, and every reader knows


class Qwen2VL:
    """`Qwen2VLForConditionalGeneration` (arXiv:2409.12191), all sizes, images and videos."""

    name = "qwen2_vl"
    architectures = ("Qwen2VLForConditionalGeneration",)

    def config(self, values: Mapping[str, Any]) -> Qwen2VLConfig:
        plain = {key: value for key, value in values.items() if key not in _IGNORED_CONFIG_KEYS}
        try:
            config: Qwen2VLConfig = Qwen2VLConfig.from_dict(plain)
            _check(config)
        except SourceError:
            raise
        except Exception as error:  # transformers validates with many exception types
            raise SourceError(f"config.json is not a valid Qwen2-VL config: {error}") from error
        return config

    def geometry(self, config: Any) -> Geometry:
        text, vision = config.text_config, config.vision_config
        vision_head_dim = vision.embed_dim // vision.num_heads
        return Geometry(
            rotary=(
                Rotary(_head_dim(config), tuple(text.rope_parameters["mrope_section"]), shared=False),
                Rotary(vision_head_dim, (vision_head_dim // 4,) * 2, shared=True),
            )
        )

    def variants(self, config: Any) -> dict[str, tuple[Input, ...]]:
        vision = config.vision_config
        patches = f"{vision.spatial_merge_size**2}*merged"
        pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        text = (
            Input("input_ids", torch.int64, (1, "sequence")),
            Input("position_ids", torch.int64, (3, 1, "sequence")),
            Input("text_cu_seqlens", torch.int32, ("samples",)),
        )
        image = (
            Input("feature_index", torch.int64, (1, "sequence")),
            Input("pixel_values", torch.float32, (patches, pixels)),
            Input("vision_position_ids", torch.int64, (patches, 2)),
            Input("vision_cu_seqlens", torch.int32, ("segments",)),
        )
        return {"image": (*text, *image), "text": text}

    def module(self, config: Any, variant: str, attention: str) -> nn.Module:
        model = meta_module(Qwen2VLForConditionalGeneration, config, attention, COMPUTE_DTYPE)
        return {"image": _ImageCore, "text": _TextCore}[variant](model)

    def ties(self, config: Any) -> dict[str, str]:
        tied = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
        return tied if config.tie_word_embeddings else {}

    def constants(self, config: Any) -> dict[str, Tensor]:
        return {
            "model.visual.rotary_pos_emb.inv_freq": Qwen2VLVisionRotaryEmbedding(config.vision_config).inv_freq,
            "model.language_model.rotary_emb.inv_freq": Qwen2VLRotaryEmbedding(config.text_config).inv_freq,
        }

    def role(self, name: str) -> Role:
        prefixes: dict[str, Role] = {
            "model.visual.merger.": "projector",
            "model.visual.": "vision",
            "model.language_model.embed_tokens.": "embedding",
            "lm_head.": "head",
        }
        return next((role for prefix, role in prefixes.items() if name.startswith(prefix)), "language")

    def stored_name(self, name: str) -> str:
        for module, stored in (("model.visual.", "visual."), ("model.language_model.", "model.")):
            if name.startswith(module):
                return stored + name.removeprefix(module)
        return name

    def module_name(self, stored: str) -> str:
        if stored.startswith("visual."):
            return f"model.{stored}"
        if stored.startswith("model.") and not stored.startswith(("model.visual.", "model.language_model.")):
            return f"model.language_model.{stored.removeprefix('model.')}"
        return stored

    def prepare(self, batch: Mapping[str, Tensor], config: Any) -> HostBatch:
        return prepare(batch, config)

    def processor(self, directory: Path) -> Any:
        processor_class = Qwen2VLProcessor if is_torchvision_available() else ImageTextProcessor
        try:
            _check_tokenizer(directory)
            return processor_class.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError for bad files
            raise SourceError(
                f"The processor in {directory} cannot be loaded: {error} A Qwen2-VL checkpoint has a tokenizer "
                "(tokenizer.json, or vocab.json and merges.txt) and preprocessor_config.json or processor_config.json."
            ) from error


def _check_tokenizer(directory: Path) -> None:
    """Without these files transformers makes a tokenizer of nothing but special tokens, and every text becomes empty."""
    layouts = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    if not any(all((directory / name).is_file() for name in layout) for layout in layouts):
        raise FileNotFoundError("it has no tokenizer.")


class _TextCore(nn.Module):
    """The traced module of a batch without images; its children carry transformers' names.

    A batch is packed: the tokens of all samples in one row, no padding, with the samples' bounds for attention.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.model
        self.lm_head = model.lm_head

    def forward(self, input_ids: Tensor, position_ids: Tensor, text_cu_seqlens: Tensor) -> Tensor:
        return self.logits(self.embed(input_ids), position_ids, text_cu_seqlens)

    def embed(self, input_ids: Tensor) -> Tensor:
        embeddings: Tensor = self.model.language_model.embed_tokens(input_ids)
        return embeddings

    def logits(self, embeddings: Tensor, position_ids: Tensor, text_cu_seqlens: Tensor) -> Tensor:
        hidden = self.model.language_model(
            inputs_embeds=embeddings, position_ids=position_ids, cu_seq_lens_q=text_cu_seqlens, use_cache=False
        ).last_hidden_state
        logits: Tensor = self.lm_head(hidden)
        return logits


class _ImageCore(_TextCore):
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
        embeddings = self.embed(input_ids)
        # Equal to transformers' masked_scatter, without a data-dependent size: -1 marks text, whose row 0 is not used.
        placed = features[feature_index.clamp(min=0)].to(embeddings.dtype)
        embeddings = torch.where((feature_index >= 0).unsqueeze(-1), placed, embeddings)
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
    if text.rope_parameters["rope_type"] not in _STATIC_ROPE_TYPES:
        raise SourceError(
            f"config.json: rope_type {text.rope_parameters['rope_type']!r} depends on the data and cannot be compiled. "
            f"Supported: {', '.join(_STATIC_ROPE_TYPES)}."
        )
    if text.attention_dropout:
        raise SourceError(
            f"config.json: attention_dropout {text.attention_dropout} is not supported; set it to 0, as published configs do."
        )
    if any(kind != "full_attention" for kind in text.layer_types):
        raise SourceError("config.json: sliding-window attention is not supported; set use_sliding_window to false.")

"""The zoo's Qwen2-VL: tokenizer, processor, configuration, and what the warm-up probes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.zoo_training.probe import cells_of
from tests.zoo_training.tokenizer import byte_level_bpe
from vlmbuild.demo.digits import Sample
from vlmbuild.families.qwen2_vl.processor import ImageTextProcessor

WARM_UP_STEPS, STEPS = 2000, 3500
EMPTY_WEIGHT = 1.0
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_tokenizer() -> Qwen2Tokenizer:
    """Make the zoo's vocabulary in the family's own tokenizer class."""
    model = json.loads(byte_level_bpe().to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],  # type: ignore[misc]
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=2048,
    )


def make_processor() -> Any:
    """Make the family's processor with the zoo's tokenizer and small pixel limits."""
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64},
        image_mean=[1.0] * 3,  # the paper is white: empty patches become zero
        image_std=[0.3] * 3,
    )
    return ImageTextProcessor(image_processor, make_tokenizer(), chat_template=CHAT_TEMPLATE)


def make_config(tokenizer: Any) -> Qwen2VLConfig:
    """Make a config with all layer kinds of Qwen2-VL: grouped queries, head_dim 128 with the published M-RoPE sections, tied head."""
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    vocabulary = (max(ids.values()) + 64) // 64 * 64
    return Qwen2VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": 256,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={"depth": 3, "embed_dim": 64, "hidden_size": 256, "num_heads": 2, "mlp_ratio": 4},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="float32",
    )


def make_model(config: Any) -> Any:
    """Make the randomly initialised model."""
    return Qwen2VLForConditionalGeneration(config)


def vision_modules(model: Any) -> tuple[nn.Module, ...]:
    """List the modules that the warm-up trains."""
    return (model.model.visual,)


def patch_features(model: Any, images: Any) -> Tensor:
    """Compute the vision tower's output for every merged patch of a batch of images."""
    features: Tensor = model.model.visual(images["pixel_values"], grid_thw=images["image_grid_thw"]).pooler_output
    return features


def patch_cells(samples: Sequence[Sample], images: Any) -> Tensor:
    """Return the digit at each row of `patch_features`: two by two patches are merged."""
    grids = images["image_grid_thw"].tolist()
    cells = [
        cells_of(sample, height // 2, width // 2) for sample, (_, height, width) in zip(samples, grids, strict=True)
    ]
    return torch.cat([cell.flatten() for cell in cells])

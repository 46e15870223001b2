"""The zoo's Llama 3.2 Vision: tokenizer, processor, configuration, and what the warm-up probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_pil_mllama import (
    MllamaImageProcessorPil,
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)
from transformers.models.mllama.processing_mllama import MllamaProcessor

from tests.zoo_training.probe import IGNORED, cells_of
from tests.zoo_training.tokenizer import BASE_TOKENS, fast_tokenizer
from vlmbuild.demo.digits import Sample

WARM_UP_STEPS, STEPS = 4000, 3500
EMPTY_WEIGHT = 1.0
TILE, PATCH, TILES = 56, 28, 4
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|reserved_special_token_2|>",
    "<|reserved_special_token_3|>",
    "<|reserved_special_token_4|>",
)
IMAGE_TOKEN = "<|image|>"  # no password
VOCABULARY = BASE_TOKENS + len(SPECIAL_TOKENS)
"""Number of tokens that the head can predict. The image token comes after: it has an embedding, and no logit."""

CHAT_TEMPLATE = """<|begin_of_text|>{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|image|>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}\
{% endif %}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""


def make_processor() -> Any:
    """Make the family's processor with the zoo's tokenizer and small tiles."""
    image_processor = MllamaImageProcessorPil(
        size={"height": TILE, "width": TILE},
        max_image_tiles=TILES,
        image_mean=[1.0] * 3,  # the paper is white: empty patches become zero
        image_std=[0.3] * 3,
    )
    tokenizer = fast_tokenizer(
        (*SPECIAL_TOKENS, IMAGE_TOKEN), bos="<|begin_of_text|>", eos="<|eot_id|>", pad="<|finetune_right_pad_id|>"
    )
    return MllamaProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


def make_config(tokenizer: Any) -> MllamaConfig:
    """Make a config with all layer kinds: self- and cross-attention with grouped queries, local and global vision layers."""
    hidden, vision = 128, 128
    intermediate = [0, 1]  # after the first two local layers
    return MllamaConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": hidden,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "cross_attention_layers": [1, 3],
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": vision,
            "intermediate_size": 320,
            "num_hidden_layers": 3,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
            "max_num_tiles": TILES,
            "intermediate_layers_indices": intermediate,
            "vision_output_dim": vision * (1 + len(intermediate)),
        },
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        dtype="float32",
    )


def make_model(config: Any) -> Any:
    """Make the initialised model with all gates ajar: shut, as transformers makes them, no gradient reaches the vision tower.

    Position embeddings start as large as what they are added to: attention has to find neighbours by them alone.
    """
    model: Any = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate", "gate_attn", "gate_ffn")):
            nn.init.constant_(parameter, 0.5)
    positions = model.model.vision_model.gated_positional_embedding
    nn.init.normal_(positions.embedding, std=0.5)
    nn.init.normal_(positions.tile_embedding.weight, std=0.5)
    return model


def vision_modules(model: Any) -> tuple[nn.Module, ...]:
    """List the modules that the warm-up trains."""
    return model.model.vision_model, model.model.multi_modal_projector


def patch_features(model: Any, images: Any) -> Tensor:
    """Compute the projected features of every patch of all four tiles of a batch of images, without the class embeddings'."""
    inputs = {name: images[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    tower = model.model.vision_model(**inputs).last_hidden_state
    features: Tensor = model.model.multi_modal_projector(tower)[:, :, :, 1:]
    return features.flatten(0, -2)


def patch_cells(samples: Sequence[Sample], images: Any) -> Tensor:
    """Return the digit at each row of `patch_features`; `IGNORED` where an image has no such tile."""
    return torch.cat([_tile_cells(sample).flatten() for sample in samples])


def _tile_cells(sample: Sample) -> Tensor:
    """Cells by tile and patch: the image is scaled to fit a canvas of tiles and lies at its top left."""
    width, height = sample.image.size
    canvas_height, canvas_width = get_optimal_tiled_canvas(height, width, TILES, TILE)
    fitted_height, fitted_width = get_image_size_fit_to_canvas(height, width, canvas_height, canvas_width, TILE)
    scale_x, scale_y = fitted_width / canvas_width, fitted_height / canvas_height
    centres = tuple((x * scale_x, y * scale_y) for x, y in sample.centres)
    grid = cells_of(replace(sample, centres=centres), int(canvas_height) // PATCH, int(canvas_width) // PATCH)
    side = TILE // PATCH
    tiles = grid.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2).reshape(-1, side * side)
    missing = torch.full((TILES - len(tiles), side * side), IGNORED)
    return torch.cat([tiles, missing])

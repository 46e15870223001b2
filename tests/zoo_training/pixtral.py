"""The zoo's Pixtral: tokenizer, processor, configuration, and what the warm-up probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from tests.zoo_training.probe import cells_of
from tests.zoo_training.tokenizer import BASE_TOKENS, fast_tokenizer
from vlmbuild.demo.digits import Sample
from vlmbuild.families.pixtral.processor import ImageTextPixtralProcessor

WARM_UP_STEPS, STEPS = 3000, 2500
EMPTY_WEIGHT = 1.0
PATCH = 20
SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
)
CHAT_TEMPLATE = """<s>{% for message in messages %}{% if message['role'] == 'assistant' %}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{{ part['text'] }}{% endfor %}{% endif %}</s>{% else %}[INST]{% if message['content'] is string %}\
{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}[IMG]\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}[/INST]{% endif %}{% endfor %}"""


def make_processor() -> Any:
    """Make the family's processor with the zoo's tokenizer and patches a little smaller than a digit."""
    image_processor = PixtralImageProcessorPil(
        size={"longest_edge": 8 * PATCH},
        patch_size={"height": PATCH, "width": PATCH},
        image_mean=[0.8] * 3,  # were white zero, the norm after the first layer would make a trace of ink a patch of it
        image_std=[0.3] * 3,
    )
    tokenizer = fast_tokenizer(SPECIAL_TOKENS, bos="<s>", eos="</s>", pad="<pad>")
    return ImageTextPixtralProcessor(image_processor, tokenizer, patch_size=PATCH, chat_template=CHAT_TEMPLATE)


def make_config(tokenizer: Any) -> LlavaConfig:
    """Make a config with all layer kinds of Pixtral: grouped queries with a head_dim of their own, untied head, gated vision layers."""
    return LlavaConfig(
        text_config={
            "model_type": "mistral",
            "vocab_size": BASE_TOKENS + len(SPECIAL_TOKENS),
            "hidden_size": 128,
            "head_dim": 64,  # four heads of it are wider than the hidden size
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_window": None,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 8 * PATCH,
            "patch_size": PATCH,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "axial", "rope_theta": 1e2},  # grids are a few patches wide
            "initializer_range": 0.05,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        image_seq_length=1,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
        dtype="float32",
    )


def make_model(config: Any) -> Any:
    """Make the randomly initialised model."""
    return LlavaForConditionalGeneration(config)


def vision_modules(model: Any) -> tuple[nn.Module, ...]:
    """List the modules that the warm-up trains."""
    return model.model.vision_tower, model.model.multi_modal_projector


def patch_features(model: Any, images: Any) -> Tensor:
    """Compute the projected features of every patch of a batch of images."""
    tower = model.model.vision_tower(images["pixel_values"], image_sizes=images["image_sizes"])
    features: Tensor = model.model.multi_modal_projector(tower.last_hidden_state)[0]
    return features


def patch_cells(samples: Sequence[Sample], images: Any) -> Tensor:
    """Return the digit at each row of `patch_features`: canvases are stretched to whole patches."""
    sizes = images["image_sizes"].tolist()
    cells = [
        cells_of(sample, height // PATCH, width // PATCH)
        for sample, (height, width) in zip(samples, sizes, strict=True)
    ]
    return torch.cat([cell.flatten() for cell in cells])

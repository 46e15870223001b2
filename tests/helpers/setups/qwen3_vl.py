"""Qwen3-VL, all dense sizes."""

from __future__ import annotations

import functools
from typing import Any

from processors import image_processor

from setups import qwen2_vl
from setups.base import MLP, QKVO, Setup
from tests.zoo_training.qwen3_vl import ADDED_TOKENS
from vlmbuild.families import FAMILIES
from vlmbuild.families.qwen3_vl.processor import FrameTextProcessor

# Equal to the published template for system, user and assistant messages of text, images and videos; tools are left out. Other than
# Qwen2-VL's it writes no system message by itself.
_SYSTEM = '{%- if loop.first and message.role != "system" -%}'
QWEN3_TEMPLATE = qwen2_vl.QWEN_TEMPLATE.replace(_SYSTEM, "{%- if false -%}")


@functools.cache
def processor() -> Any:
    """Make Qwen3-VL's processor, all sizes."""
    return FrameTextProcessor(
        image_processor("qwen3-vl-8b"), qwen2_vl.make_tokenizer(list(ADDED_TOKENS)), chat_template=QWEN3_TEMPLATE
    )


def setup(full: bool) -> Setup:
    """Make the setup: DeepStack from two of three blocks, heads that are not the hidden size by their number, a small grid of
    positions, and a head of its own."""
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": 151936,
        "num_hidden_layers": 3,
        "head_dim": 48,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [10, 8, 6],
            "mrope_interleaved": True,
            "rope_theta": 5e6,
        },
    }
    vision = {
        "model_type": "qwen3_vl_vision",
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "out_hidden_size": 128,
        "num_position_embeddings": 81,
        "deepstack_visual_indexes": [0, 1],
    }
    numbers = ("vision_config.hidden_size", "vision_config.out_hidden_size", "vision_config.num_position_embeddings")
    return qwen2_vl.qwen_setup(
        FAMILIES["qwen3_vl"],
        processor(),
        full,
        {"model_type": "qwen3_vl", "tie_word_embeddings": False, "text_config": text, "vision_config": vision},
        numbers=(*numbers, "text_config.head_dim"),
        layers={"attention": QKVO | {"qkv", "proj"}, "mlp": MLP | {"linear_fc1", "linear_fc2"}},
    )

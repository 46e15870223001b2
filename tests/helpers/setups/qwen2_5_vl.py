"""Qwen2.5-VL, all sizes: the tokenizer, the template and the settings of images are Qwen2-VL's."""

from __future__ import annotations

import functools
from typing import Any

from processors import image_processor

from setups import qwen2_vl
from setups.base import MLP, QKVO, Setup
from vlmbuild.families import FAMILIES
from vlmbuild.families.qwen2_5_vl.processor import FrameTextProcessor


@functools.cache
def processor() -> Any:
    """Make Qwen2.5-VL's processor, all sizes."""
    shared = qwen2_vl.processor()
    return FrameTextProcessor(image_processor("qwen2.5-vl-7b"), shared.tokenizer, chat_template=shared.chat_template)


def setup(full: bool) -> Setup:
    """Make the setup: two blocks in windows around one with full attention, and a head of its own."""
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "out_hidden_size": 128,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    numbers = ("hidden_size", "window_size", "out_hidden_size", "tokens_per_second")
    return qwen2_vl.qwen_setup(
        FAMILIES["qwen2_5_vl"],
        processor(),
        full,
        {"model_type": "qwen2_5_vl", "tie_word_embeddings": False, "vision_config": vision},
        numbers=tuple(f"vision_config.{name}" for name in numbers),
        layers={"attention": QKVO | {"qkv", "proj"}, "mlp": MLP},
    )

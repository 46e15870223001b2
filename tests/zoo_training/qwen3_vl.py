"""The zoo's Qwen3-VL: processor and configuration. Its weights start from the zoo's Qwen2-VL, which has most of the same layers."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.zoo_training import qwen2_vl
from tests.zoo_training.qwen2_vl import CHAT_TEMPLATE, patch_cells, patch_features, vision_modules
from tests.zoo_training.start import start_from, trained
from vlmbuild.families.qwen3_vl.processor import FrameTextProcessor

__all__ = ["make_config", "make_model", "make_processor", "patch_cells", "patch_features", "vision_modules"]

WARM_UP_STEPS, STEPS = 0, 1500
EMPTY_WEIGHT = 1.0
ADDED_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
"""Tokens behind the special ones, which Qwen3 has beside Qwen2's."""
RENAMED = {
    ".mlp.fc1.": ".mlp.linear_fc1.",
    ".mlp.fc2.": ".mlp.linear_fc2.",
    ".merger.ln_q.": ".merger.norm.",
    ".merger.mlp.0.": ".merger.linear_fc1.",
    ".merger.mlp.2.": ".merger.linear_fc2.",
}
"""Parts of Qwen2-VL's parameter names -> those of Qwen3-VL."""


def make_processor() -> Any:
    """Make the family's processor with the zoo's tokenizer and Qwen2-VL's patches and pixel limits."""
    qwen2 = qwen2_vl.make_processor()
    qwen2.tokenizer.add_tokens(list(ADDED_TOKENS))
    return FrameTextProcessor(qwen2.image_processor, qwen2.tokenizer, chat_template=CHAT_TEMPLATE)


def make_config(tokenizer: Any) -> Qwen3VLConfig:
    """Make a config with all layer kinds of Qwen3-VL: grouped queries of normed heads, the published sections of interleaved
    M-RoPE, a table of positions that images exceed, and a DeepStack merger."""
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(name) for name in qwen2_vl.SPECIAL_TOKENS}
    hidden = 256
    return Qwen3VLConfig(
        text_config={
            "vocab_size": (len(tokenizer) + 15) // 16 * 16,
            "hidden_size": hidden,
            "head_dim": 128,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
                "rope_theta": 5e6,
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_heads": 2,
            "patch_size": 14,
            "out_hidden_size": hidden,
            "num_position_embeddings": 8 * 8,
            "deepstack_visual_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="float32",
    )


def make_model(config: Any) -> Any:
    """Make the model with the weights of the zoo's Qwen2-VL; what Qwen2-VL lacks is initialised at random."""
    return start_from(Qwen3VLForConditionalGeneration(config), trained("qwen2-vl-digits", RENAMED))

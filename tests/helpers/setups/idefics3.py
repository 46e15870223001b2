"""Idefics3 8B."""

from __future__ import annotations

import functools
from typing import Any

from processors import image_processor
from transformers import Idefics3Processor, PreTrainedTokenizerFast

from setups.base import MLP, QKVO, Setup, make_setup
from setups.mllama import LLAMA_SPECIAL, llama3
from setups.smolvlm import with_tiles
from vlmbuild.families import FAMILIES

FAMILY = FAMILIES["idefics3"]

# Tags of tiles are no tokens of this vocabulary.
SPECIAL = [
    *LLAMA_SPECIAL[:-1],
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
]

IDEFICS3_TEMPLATE = (
    "<|begin_of_text|>{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@functools.cache
def processor() -> Any:
    """Make Idefics3 8B's processor."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=llama3(SPECIAL),
        bos_token="<|begin_of_text|>",
        eos_token="<end_of_utterance>",
        pad_token="<|reserved_special_token_0|>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=131072,
    )
    return Idefics3Processor(
        image_processor("idefics3-8b"), tokenizer, image_seq_len=169, chat_template=IDEFICS3_TEMPLATE
    )


def setup(full: bool) -> Setup:
    """Make the setup; `full` has the published tiles of 364 pixels, else 56."""
    side = 364 if full else 56
    values = {
        "model_type": "idefics3",
        "image_token_id": 128257,
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 128259,
            "max_position_embeddings": 131072,
            "num_hidden_layers": 3,
            "pad_token_id": 128002,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        "vision_config": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 96,
            "image_size": side,
            "patch_size": 14,
        },
    }
    return make_setup(
        FAMILY,
        with_tiles(processor(), side, (side // 14 // 2) ** 2),
        {"longest_edge": 2 * side},
        values,
        largest=(4 * side, 4 * side),
        smallest=(1, 1),
        media=("<image>", "<fake_token_around_image>"),
        end="<end_of_utterance>",
        lead=" ",
        numbers=("vision_config.patch_size", "vision_config.image_size", "scale_factor"),
        layers={"attention": QKVO | {"out_proj"}, "mlp": MLP | {"fc1", "fc2"}},
    )

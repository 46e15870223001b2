"""Pixtral 12B."""

from __future__ import annotations

import functools
from typing import Any

from processors import image_processor, shipped
from transformers import PreTrainedTokenizerFast
from transformers.integrations.mistral.tokenizer import MistralConverter

from setups.base import MLP, QKVO, Setup, make_setup
from vlmbuild.families import FAMILIES
from vlmbuild.families.pixtral.processor import ImageTextPixtralProcessor

FAMILY = FAMILIES["pixtral"]

# The system message goes into the last user's message; the answer of the assistant ends with the end token.
PIXTRAL_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}
{{ content }}
{%- else -%}
{%- for part in content -%}{{ "[IMG]" if part.type == "image" else part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set system = "" -%}
{%- if messages[0].role == "system" -%}
{%- set system = text(messages[0].content) + "\\n\\n" -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{{ bos_token }}
{%- for message in messages -%}
{%- if (message.role == "user") != (loop.index0 % 2 == 0) -%}
{{ raise_exception("User and assistant must take turns.") }}
{%- elif message.role == "user" -%}
{{ "[INST]" + (system if loop.last else "") + text(message.content) + "[/INST]" }}
{%- else -%}
{{ text(message.content) + eos_token }}
{%- endif -%}
{%- endfor -%}
"""


@functools.cache
def processor() -> Any:
    """Make Pixtral 12B's processor."""
    return ImageTextPixtralProcessor(image_processor("pixtral-12b"), tekken(), chat_template=PIXTRAL_TEMPLATE)


@functools.cache
def tekken() -> PreTrainedTokenizerFast:
    """Make Mistral's tokenizer of version 3, which names the special tokens of later versions too."""
    converter = MistralConverter(str(shipped("mistral-common", "data/tekken_240911.json")))
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=1024000,
    )


def setup(full: bool) -> Setup:
    """Make the setup; `full` has the published longest edge of 1024 pixels, else 192."""
    edge = 1024 if full else 192
    values = {
        "model_type": "llava",
        "image_token_index": 10,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": {
            "model_type": "mistral",
            "vocab_size": 131072,
            "num_hidden_layers": 3,
            "head_dim": 64,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 96,
            "patch_size": 16,
            "image_size": 1024,
            "hidden_act": "silu",
        },
    }
    media = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    return make_setup(
        FAMILY,
        processor(),
        {"longest_edge": edge},
        values,
        largest=(2 * edge, 2 * edge),
        smallest=(1, 1),
        media=media,
        end="</s>",
        numbers=("vision_config.patch_size", "vision_config.image_size", "text_config.head_dim"),
        layers={"attention": QKVO, "mlp": MLP},
    )

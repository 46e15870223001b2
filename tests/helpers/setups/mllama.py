"""Llama 3.2 Vision, both sizes."""

from __future__ import annotations

import functools
from typing import Any

from processors import image_processor, shipped, with_special
from tokenizers import Tokenizer
from transformers import MllamaProcessor, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from setups.base import MLP, QKVO, Setup, make_setup
from vlmbuild.families import FAMILIES

FAMILY = FAMILIES["mllama"]

_LLAMA_NAMED = [
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
]
# Meta's own tokenizer has <|image|> at 128011; published for transformers, it is the last, behind all reserved ones.
LLAMA_SPECIAL = [*_LLAMA_NAMED, *(f"<|reserved_special_token_{2 + index}|>" for index in range(245)), "<|image|>"]

# A system message is only allowed before text without images; the date is today's in the published one, fixed here.
LLAMA_TEMPLATE = """\
{%- set found = namespace(image=false) -%}
{%- set system = "" -%}
{%- if messages[0].role == "system" -%}
{%- set first = messages[0].content -%}
{%- set system = (first if first is string else first | map(attribute="text") | join) | trim -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages if message.content is not string -%}
{%- for part in message.content if part.type == "image" -%}{%- set found.image = true -%}{%- endfor -%}
{%- endfor -%}
{{ bos_token }}
{%- if found.image and system -%}
{{ raise_exception("Prompting with images is incompatible with system messages.") }}
{%- elif not found.image -%}
{{ "<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + (date_string or "26 Jul 2024") + "\\n\\n" + system + "<|eot_id|>" }}
{%- endif -%}
{%- for message in messages -%}
{{ "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{{ "<|image|>" if part.type == "image" else part.text }}
{%- endfor -%}
{%- endif -%}
{{ "<|eot_id|>" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{%- endif -%}
"""


@functools.cache
def _vocabulary() -> str:
    converted: Tokenizer = TikTokenConverter(str(shipped("llama-models", "llama3/tokenizer.model"))).converted()
    return converted.to_str()


def llama3(special: list[str]) -> Tokenizer:
    """Make Llama 3's vocabulary with special tokens after it."""
    return with_special(Tokenizer.from_str(_vocabulary()), special)


@functools.cache
def processor() -> Any:
    """Make Llama 3.2 Vision's processor, both sizes."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=llama3(LLAMA_SPECIAL),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=131072,
    )
    return MllamaProcessor(image_processor("llama-3.2-11b-vision"), tokenizer, chat_template=LLAMA_TEMPLATE)


def setup(full: bool) -> Setup:
    """Make the setup; `full` has the published tiles of 560 pixels, else 112."""
    side = 560 if full else 112
    values = {
        "model_type": "mllama",
        "image_token_index": 128256,
        "text_config": {
            "vocab_size": 128256,
            "num_hidden_layers": 5,
            "cross_attention_layers": [1, 3],
            "pad_token_id": 128004,
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
            "num_hidden_layers": 4,
            "num_global_layers": 2,
            "attention_heads": 2,
            "intermediate_size": 96,
            "image_size": side,
            "patch_size": 14,
            "intermediate_layers_indices": [0, 2],
            "vision_output_dim": 192,
        },
    }
    size = {"height": side, "width": side}
    return make_setup(
        FAMILY,
        processor(),
        size,
        values,
        largest=(4 * side, 4 * side),
        smallest=(1, 1),
        media=("<|image|>",),
        end="<|eot_id|>",
        numbers=("vision_config.patch_size", "vision_config.num_global_layers", "vision_config.max_num_tiles"),
        layers={"attention": QKVO, "mlp": MLP | {"fc1", "fc2"}},
    )

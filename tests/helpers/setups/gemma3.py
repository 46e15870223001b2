"""Gemma 3, all sizes."""

from __future__ import annotations

import functools
from typing import Any

from processors import image_processor
from tokenizers import AddedToken
from transformers import Gemma3Processor, GemmaTokenizer

from setups.base import MLP, QKVO, Setup, make_setup
from vlmbuild.families import FAMILIES

FAMILY = FAMILIES["gemma3"]

IMAGE, BEGIN, END = "<image_soft_token>", "<start_of_image>", "<end_of_image>"
_TURNS = ("<start_of_turn>", "<end_of_turn>")
_BREAKS = 31
"""Line breaks that have a token."""
_SPECIAL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<start_of_turn>": 105, "<end_of_turn>": 106}
_SPECIAL |= {BEGIN: 255999, END: 256000, IMAGE: 262144}
_BYTES, _CHARACTERS = 238, 236743

# As published: the system message begins the first user's, and every text is trimmed.
GEMMA_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""


@functools.cache
def _tokenizer() -> GemmaTokenizer:
    """Make a tokenizer with Gemma's ids of special tokens, line breaks and bytes: no package has its vocabulary. Texts are
    characters; all else is filled."""
    characters = ["▁", *map(chr, range(33, 127)), *"äéöüß"]
    tokens = _SPECIAL | {"\n" * count: 106 + count for count in range(1, _BREAKS + 1)}
    tokens |= {f"<0x{byte:02X}>": _BYTES + byte for byte in range(256)}
    tokens |= {character: _CHARACTERS + number for number, character in enumerate(characters)}
    named = {number: token for token, number in tokens.items()}
    vocabulary = {named.get(number, f"<unused{number}>"): number for number in range(_SPECIAL[IMAGE] + 1)}
    tokenizer = GemmaTokenizer(
        vocab=vocabulary,
        merges=[("\n" * first, "\n" * (count - first)) for count in range(2, _BREAKS + 1) for first in range(1, count)],
        extra_special_tokens={"image_token": IMAGE, "boi_token": BEGIN, "eoi_token": END},
        model_max_length=131072,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in _TURNS])
    return tokenizer


@functools.cache
def processor() -> Any:
    """Make the processor of all sizes."""
    return _processor(image_processor("gemma-3-4b"), 256)


def _processor(images: Any, tokens: int) -> Any:
    return Gemma3Processor(images, _tokenizer(), chat_template=GEMMA_TEMPLATE, image_seq_length=tokens)


def setup(full: bool) -> Setup:
    """Make the setup; `full` has the published squares of 896 pixels, else 48. Blocks are longer than the window."""
    side, patch, tokens = (896, 14, 256) if full else (48, 6, 16)
    values = {
        "model_type": "gemma3",
        "boi_token_index": _SPECIAL[BEGIN],
        "eoi_token_index": _SPECIAL[END],
        "image_token_index": _SPECIAL[IMAGE],
        "mm_tokens_per_image": tokens,
        "text_config": {
            "model_type": "gemma3_text",
            "vocab_size": 262208,
            "num_hidden_layers": 3,
            "head_dim": 64,
            "query_pre_attn_scalar": 48,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 96,
            "image_size": side,
            "patch_size": patch,
            "vision_use_head": False,
        },
    }
    return make_setup(
        FAMILY,
        _processor(image_processor("gemma-3-4b"), tokens),
        {"height": side, "width": side},
        values,
        largest=(300, 300),
        smallest=(1, 1),
        media=(BEGIN, IMAGE, END),
        end="<end_of_turn>",
        numbers=(
            "mm_tokens_per_image",
            "text_config.head_dim",
            "vision_config.patch_size",
            "vision_config.image_size",
        ),
        layers={"attention": QKVO | {"out_proj"}, "mlp": MLP | {"fc1", "fc2"}},
    )

"""Qwen2-VL, all sizes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from processors import image_processor, shipped, with_special
from tokenizers import normalizers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer

from setups.base import MLP, QKVO, Setup, make_setup
from vlmbuild.families import FAMILIES, Family
from vlmbuild.families.qwen2_vl.processor import ImageTextProcessor

FAMILY = FAMILIES["qwen2_vl"]

QWEN_SPECIAL = [
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
]
# Equal to the published templates for system, user and assistant messages of text and images; tools are left out.
QWEN_TEMPLATE = """\
{%- set pictures = namespace(count=0) -%}
{%- for message in messages -%}
{%- if loop.first and message.role != "system" -%}
{{ "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" }}
{%- endif -%}
{{ "<|im_start|>" + message.role + "\\n" }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "image" -%}
{%- set pictures.count = pictures.count + 1 -%}
{%- if add_vision_id -%}{{ "Picture " ~ pictures.count ~ ": " }}{%- endif -%}
{{ "<|vision_start|><|image_pad|><|vision_end|>" }}
{%- elif part.type == "video" -%}
{{ "<|vision_start|><|video_pad|><|vision_end|>" }}
{%- elif "text" in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ "<|im_end|>\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" }}{%- endif -%}
"""


def make_tokenizer(added: Sequence[str] = ()) -> Qwen2Tokenizer:
    """Make the tokenizer of Qwen's models; `added` tokens have ids behind the special ones and are not special."""
    converter = TikTokenConverter(str(shipped("dashscope", "resources/qwen.tiktoken")), pattern=PRETOKENIZE_REGEX)
    backend = with_special(converter.converted(), QWEN_SPECIAL)
    backend.add_tokens(list(added))
    backend.normalizer = normalizers.NFC()
    backend.model.ignore_merges = False  # as published; the converter of tiktoken's files says True
    return Qwen2Tokenizer(
        tokenizer_object=backend,
        unk_token=None,  # type: ignore[arg-type]  # as published; the annotation is too narrow
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=QWEN_SPECIAL[1:],
        model_max_length=32768,
    )


@functools.cache
def processor() -> Any:
    """Make Qwen2-VL's processor, all sizes."""
    return ImageTextProcessor(image_processor("qwen2-vl-2b"), make_tokenizer(), chat_template=QWEN_TEMPLATE)


TOKENS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "bos_token_id": None,
    "eos_token_id": None,
}
TEXT = {
    "vocab_size": 151936,
    "num_hidden_layers": 3,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
}


def qwen_setup(family: Family, processor: Any, full: bool, values: dict[str, Any], **facts: Any) -> Setup:
    """Make the setup of a model with Qwen2-VL's tokens and images; `full` raises the limit to the processor class's 1280
    tokens per image."""
    token = (processor.image_processor.patch_size * processor.image_processor.merge_size) ** 2
    size = {"shortest_edge": 4 * token, "longest_edge": (1280 if full else 80) * token}
    images = {"largest": (3000, 2000), "smallest": (20, 20), "media": ("<|image_pad|>",), "end": "<|im_end|>"}
    return make_setup(family, processor, size, {"text_config": TEXT, **TOKENS, **values}, **images, **facts)


def setup(full: bool) -> Setup:
    """Make the setup, with tied embeddings."""
    values = {
        "model_type": "qwen2_vl",
        "tie_word_embeddings": True,
        "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2},
    }
    return qwen_setup(
        FAMILY,
        processor(),
        full,
        values,
        numbers=(
            "vision_config.depth",
            "vision_config.embed_dim",
            "vision_config.num_heads",
            "vision_config.hidden_size",
        ),
        layers={"attention": QKVO | {"qkv", "proj"}, "mlp": MLP | {"fc1", "fc2"}},
    )

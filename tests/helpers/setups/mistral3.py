"""Mistral Small 3.1 and 3.2, and Ministral 3."""

from __future__ import annotations

import functools
from typing import Any

from processors import image_processor

from setups.base import MLP, QKVO, Setup, make_setup
from setups.pixtral import tekken
from vlmbuild.families import FAMILIES
from vlmbuild.families.pixtral.processor import ImageTextPixtralProcessor

FAMILY = FAMILIES["mistral3"]

# A system message has tokens of its own, where it is.
TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}
{{ content }}
{%- else -%}
{%- for part in content -%}{{ "[IMG]" if part.type == "image" else part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- for message in messages -%}
{%- if message.role == "system" -%}
{{ "[SYSTEM_PROMPT]" + text(message.content) + "[/SYSTEM_PROMPT]" }}
{%- elif message.role == "user" -%}
{{ "[INST]" + text(message.content) + "[/INST]" }}
{%- else -%}
{{ text(message.content) + eos_token }}
{%- endif -%}
{%- endfor -%}
"""


@functools.cache
def processor() -> Any:
    """Make the processor of all sizes."""
    images = image_processor("ministral-3-8b")
    return ImageTextPixtralProcessor(images, tekken(), patch_size=14, spatial_merge_size=2, chat_template=TEMPLATE)


def setup(full: bool) -> Setup:
    """Make the setup of a Ministral 3; `full` has the published longest edge of 1540 pixels, else 196.

    Positions exceed the original length of YaRN and of the queries' scale, and YaRN scales cosine and sine.
    """
    edge = 1540 if full else 196
    values = {
        "model_type": "mistral3",
        "image_token_index": 10,
        "text_config": {
            "model_type": "ministral3",
            "vocab_size": 131072,
            "num_hidden_layers": 3,
            "head_dim": 64,
            "max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 8,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "llama_4_scaling_beta": 0.3,
            },
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 96,
            "patch_size": 14,
            "image_size": 1540,
            "hidden_act": "silu",
        },
    }
    return make_setup(
        FAMILY,
        processor(),
        {"longest_edge": edge},
        values,
        largest=(2 * edge, 2 * edge),
        smallest=(29, 1),  # two features: transformers fails on a single one
        media=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        end="</s>",
        numbers=("spatial_merge_size", "vision_config.patch_size", "vision_config.image_size", "text_config.head_dim"),
        layers={"attention": QKVO, "mlp": MLP},
    )

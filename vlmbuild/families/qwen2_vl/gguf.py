"""Qwen2-VL for llama.cpp, and what other families with its patches and positions share."""

from __future__ import annotations

import math
from typing import Any

from vlmbuild.families.config_checks import require
from vlmbuild.families.gguf import (
    BICUBIC,
    CHATML,
    GgufImages,
    GgufModel,
    GgufPart,
    pixel_values,
    rope_values,
    text_values,
    vision_values,
)

CONVOLUTION = (
    GgufPart(".weight", "V_ENC_EMBD_PATCH", frame=0),
    GgufPart(".weight.1", "V_ENC_EMBD_PATCH", frame=1),
)
"""A convolution over two frames as two over one."""
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_SIZES = (
    "llama.cpp keeps an image's proportions and fills up with black where the processor stretches it to whole patches, and "
    "rounds halves of a patch up where the processor rounds to even"
)


def mrope_text(config: Any) -> dict[str, Any]:
    """Return the metadata of a language model with positions on three axes."""
    text = config.text_config
    require(
        not getattr(text, "use_sliding_window", False),
        "use_sliding_window",
        True,
        "must be false: llama.cpp computes none here. Choose --target onnx.",
    )
    sections = [*text.rope_parameters["mrope_section"], 0]
    return text_values(text) | rope_values(text.rope_parameters) | {"rope_dimension_sections": sections}


def check_patches(vision: Any) -> None:
    """Raise SourceError for patches that llama.cpp does not cut."""
    for field in ("temporal_patch_size", "spatial_merge_size"):
        value = getattr(vision, field)
        require(value == 2, field, value, "must be 2: llama.cpp knows no other. Choose --target onnx.")


def cut(name: str, shape: tuple[int, ...]) -> tuple[GgufPart, ...] | None:
    """Cut the joined projections of attention, and the convolution."""
    if ".attn.qkv." in name:
        third = shape[0] // 3
        return tuple(
            GgufPart(name.replace("qkv", letter), rows=(number * third, (number + 1) * third))
            for number, letter in enumerate("qkv")
        )
    return CONVOLUTION if name.endswith("patch_embed.proj.weight") else None


def model(config: Any) -> GgufModel:
    """Describe a Qwen2-VL."""
    text, vision = config.text_config, config.vision_config
    check_patches(vision)
    require(
        vision.hidden_act == "quick_gelu", "hidden_act", vision.hidden_act, "must be quick_gelu. Choose --target onnx."
    )
    values = vision_values(
        text.hidden_size,
        side=560,
        patch=vision.patch_size,
        width=vision.embed_dim,
        hidden=int(vision.embed_dim * vision.mlp_ratio),
        blocks=vision.depth,
        heads=vision.num_heads,
        eps=1e-6,
    )
    return GgufModel("QWEN2VL", "QWEN2VL", mrope_text(config), values, IMAGE, CHATML, cut)


def images(processor: Any) -> GgufImages:
    """Describe images with limits of pixels."""
    settings = processor.image_processor
    area = (settings.patch_size * settings.merge_size) ** 2
    least, most = (settings.size[key] for key in ("shortest_edge", "longest_edge"))
    values = pixel_values(settings, BICUBIC) | {"vision_min_pixels": least, "vision_max_pixels": most}
    return GgufImages(values, (math.ceil(least / area), most // area), _SIZES)

"""Pixtral's tower and Mistral's language models for llama.cpp."""

from __future__ import annotations

from typing import Any

from vlmbuild.families.config_checks import require
from vlmbuild.families.gguf import (
    BICUBIC,
    INST,
    GgufImages,
    GgufModel,
    GgufPart,
    Parts,
    head_size,
    pixel_values,
    rope_values,
    siglip_values,
    text_values,
)

_THETA = 10000.0
"""The base of the tower's rotary embedding in llama.cpp, which reads none from the file."""
_SIZES = (
    "llama.cpp keeps an image's proportions and fills up with black where the processor stretches it to whole patches; it "
    "rounds to whole patches, and the processor up; it limits the area of an image, and the processor its longer side"
)


def text(config: Any) -> dict[str, Any]:
    """Return the metadata of a Mistral."""
    window = config.text_config.sliding_window
    require(window is None, "sliding_window", window, "is not what llama.cpp computes here. Choose --target onnx.")
    return text_values(config.text_config) | rope_values(config.text_config.rope_parameters)


def tower(config: Any) -> dict[str, Any]:
    """Return the metadata of the tower."""
    vision, act = config.vision_config, config.projector_hidden_act
    theta, width = vision.rope_parameters["rope_theta"], vision.head_dim * vision.num_attention_heads
    only = "is not what llama.cpp computes in this tower: {}. Choose --target onnx."
    require(theta == _THETA, "vision_config.rope_theta", theta, only.format(_THETA))
    require(vision.hidden_size == width, "vision_config.head_dim", vision.head_dim, only.format("width / heads"))
    require(vision.hidden_act == "silu", "vision_config.hidden_act", vision.hidden_act, only.format("silu"))
    require(act == "gelu", "projector_hidden_act", act, only.format("gelu"))
    return siglip_values(config.text_config.hidden_size, vision, 1e-5) | {"vision_use_silu": True}


def cuts(config: Any, row_end: int | None) -> Parts:
    """Return the cuts of parameters; `row_end` is the id of the token behind a row of patches, whose embedding the tower's
    file holds too."""
    sizes = {"model.": head_size(config.text_config), "vision_tower.": config.vision_config.head_dim}

    def cut(name: str, shape: tuple[int, ...]) -> tuple[GgufPart, ...] | None:
        del shape
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            return (GgufPart(name, head_rows=next(size for prefix, size in sizes.items() if name.startswith(prefix))),)
        if name == "model.embed_tokens.weight" and row_end is not None:
            break_row = (row_end, row_end + 1)
            return GgufPart(name), GgufPart("v.token_embd.img_break", rows=break_row, vision=True, copied=True)
        return None

    return cut


def row_end(processor: Any) -> int | None:
    """Return the id of the token behind a row of patches."""
    return None if processor is None else int(processor.image_break_token_id)


def model(config: Any, processor: Any) -> GgufModel:
    """Describe a Pixtral."""
    parts = cuts(config, row_end(processor))
    return GgufModel("LLAMA", "PIXTRAL", text(config), tower(config), "[IMG]", INST, parts)


def images(processor: Any) -> GgufImages:
    """Describe images with a longest edge."""
    edge = int(processor.image_processor.size["longest_edge"])
    side = int(processor.patch_size * processor.spatial_merge_size)
    return GgufImages(pixel_values(processor.image_processor, BICUBIC), (1, (edge // side) ** 2), _SIZES)

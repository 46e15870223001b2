"""Gemma 3 for llama.cpp."""

from __future__ import annotations

from typing import Any

from vlmbuild.families.config_checks import require
from vlmbuild.families.gguf import (
    BILINEAR,
    GgufImages,
    GgufModel,
    GgufPart,
    head_size,
    pixel_values,
    rope_values,
    siglip_values,
    text_values,
)

_SCALED_BY_WIDTH = 62
"""Layers of the model, the largest, whose queries llama.cpp scales by width over heads."""
_SIZES = (
    "llama.cpp keeps an image's proportions and fills up with black where the processor makes it square, and writes no empty "
    "lines around it"
)
_PROJECTION = "multi_modal_projector.mm_input_projection"
_TEMPLATE = (
    '<bos>{{- range .Messages }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}{{ .Role }}{{ end }}\n'
    "{{ .Content }}<end_of_turn>\n{{ end }}<start_of_turn>model\n"
)


def model(config: Any, scale: int) -> GgufModel:
    """Describe a Gemma 3; a feature is the mean of `scale` x `scale` patches."""
    text, vision = config.text_config, config.vision_config
    act = vision.hidden_act
    require(act == "gelu_pytorch_tanh", "vision_config.hidden_act", act, "is not llama.cpp's. Choose --target onnx.")
    values = siglip_values(text.hidden_size, vision, vision.layer_norm_eps) | {
        "vision_use_gelu": True,
        "vision_projector_scale_factor": scale,
    }
    return GgufModel("GEMMA3", "GEMMA3", _text(text), values, "<start_of_image>", _TEMPLATE, _cut)


def _text(text: Any) -> dict[str, Any]:
    """Return the metadata of the language model."""
    wide = text.num_hidden_layers == _SCALED_BY_WIDTH
    scale = text.hidden_size // text.num_attention_heads if wide else head_size(text)
    scalar = text.query_pre_attn_scalar
    require(
        scalar == scale, "query_pre_attn_scalar", scalar, f"must be {scale}, as in llama.cpp. Choose --target onnx."
    )
    full, local = (text.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    kind = local.get("rope_type", "default")
    require(kind == "default", "rope_type of sliding_attention", kind, "must be default. Choose --target onnx.")
    return (
        text_values(text)
        | rope_values(full)
        | {
            "rope_freq_base_swa": float(local["rope_theta"]),
            "sliding_window": text.sliding_window,
            "sliding_window_pattern": [kind == "sliding_attention" for kind in text.layer_types],
        }
    )


def _cut(name: str, shape: tuple[int, ...]) -> tuple[GgufPart, ...] | None:
    del shape
    if name == f"{_PROJECTION}_weight":
        return (GgufPart(f"{_PROJECTION}.weight"),)
    if name.endswith("norm.weight") and name.startswith(("model.", "multi_modal_projector.")):
        return (GgufPart(name, added=1.0),)  # the program multiplies by 1 + weight
    return None


def images(processor: Any) -> GgufImages:
    """Describe images of one size."""
    settings = processor.image_processor
    require(
        not settings.do_pan_and_scan,
        "do_pan_and_scan",
        True,
        "must be false: llama.cpp cuts nothing out. Choose --target onnx.",
    )
    return GgufImages(pixel_values(settings, BILINEAR), differs=_SIZES)

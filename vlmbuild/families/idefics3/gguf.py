"""Idefics3 and SmolVLM for llama.cpp."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vlmbuild.errors import SourceError
from vlmbuild.families.config_checks import require
from vlmbuild.families.gguf import (
    LANCZOS,
    GgufImages,
    GgufModel,
    GgufPart,
    head_size,
    pixel_values,
    rope_values,
    siglip_values,
    text_values,
)

_LLAMA3 = "llama3"
_WRITTEN = ("\n\n", "<fake_token_around_image>", "<global-img>")
_TEMPLATE = (
    '<|im_start|>{{- range .Messages }}{{ if eq .Role "user" }}User{{ else }}Assistant{{ end }}: {{ .Content }}'
    "<end_of_utterance>\n{{ end }}Assistant:"
)


def model(config: Any) -> GgufModel:
    """Describe a model with tiles of SigLIP and a Llama."""
    text, vision = config.text_config, config.vision_config
    act, size = vision.hidden_act, head_size(text)
    require(act == "gelu_pytorch_tanh", "vision_config.hidden_act", act, "is not llama.cpp's. Choose --target onnx.")

    def cut(name: str, shape: tuple[int, ...]) -> tuple[GgufPart, ...] | None:
        del shape
        rotated = name.startswith("model.layers.") and name.endswith(("q_proj.weight", "k_proj.weight"))
        return (GgufPart(name, head_rows=size),) if rotated else None

    values = siglip_values(text.hidden_size, vision, vision.layer_norm_eps) | {
        "vision_use_gelu": True,
        "vision_projector_scale_factor": config.scale_factor,
    }
    rotated = text_values(text) | rope_values(text.rope_parameters, _LLAMA3)
    factors = _factors(text) if text.rope_parameters.get("rope_type") == _LLAMA3 else ()
    return GgufModel("LLAMA", "IDEFICS3", rotated, values, "<image>", _TEMPLATE, cut, rope_factors=factors)


def _factors(text: Any) -> tuple[float, ...]:
    scaled, size = ROPE_INIT_FUNCTIONS[_LLAMA3](text, torch.device("cpu"))[0].double(), head_size(text)
    plain = text.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return tuple((plain / scaled).tolist())


def images(processor: Any) -> GgufImages:
    """Describe images that are cut into tiles, after their longer side has the processor's length."""
    settings = processor.image_processor
    require(
        settings.do_image_splitting,
        "do_image_splitting",
        False,
        "must be true: llama.cpp always cuts images into tiles. Choose --target onnx.",
    )
    for text in _WRITTEN:
        if len(processor.tokenizer(text, add_special_tokens=False).input_ids) != 1:
            raise SourceError(
                f"tokenizer.json: {text!r} must be one token, for llama.cpp writes it around images. Choose --target onnx."
            )
    edge = int(settings.size["longest_edge"])
    return GgufImages(pixel_values(settings, LANCZOS) | {"vision_preproc_image_size": edge})

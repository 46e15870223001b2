"""Qwen3-VL for llama.cpp."""

from __future__ import annotations

from typing import Any

from vlmbuild.families.config_checks import require
from vlmbuild.families.gguf import CHATML, GgufModel, GgufPart, vision_values
from vlmbuild.families.qwen2_vl import gguf as qwen2_vl

_DEEPSTACK = "visual.deepstack_merger_list."
_DEEPSTACK_KINDS = {"norm": "V_DS_NORM", "linear_fc1": "V_DS_FC1", "linear_fc2": "V_DS_FC2"}
_MERGER = "visual.merger."
_MERGER_KINDS = {"norm": ("V_POST_NORM", None), "linear_fc1": ("V_MMPROJ", 0), "linear_fc2": ("V_MMPROJ", 2)}


def model(config: Any) -> GgufModel:
    """Describe a Qwen3-VL."""
    vision, act = config.vision_config, config.vision_config.hidden_act
    qwen2_vl.check_patches(vision)
    require(act == "gelu_pytorch_tanh", "vision_config.hidden_act", act, "is not llama.cpp's. Choose --target onnx.")
    deep = list(vision.deepstack_visual_indexes)

    def cut(name: str, shape: tuple[int, ...]) -> tuple[GgufPart, ...] | None:
        del shape
        if name.startswith(_DEEPSTACK):
            number, layer, suffix = name.removeprefix(_DEEPSTACK).split(".")
            return (GgufPart(f".{suffix}", _DEEPSTACK_KINDS[layer], deep[int(number)]),)
        if name.startswith(_MERGER):
            layer, suffix = name.removeprefix(_MERGER).split(".")
            return (GgufPart(f".{suffix}", *_MERGER_KINDS[layer]),)
        return qwen2_vl.CONVOLUTION if name.endswith("patch_embed.proj.weight") else None

    values = vision_values(
        config.text_config.hidden_size,
        side=int(vision.num_position_embeddings**0.5) * vision.patch_size,
        patch=vision.patch_size,
        width=vision.hidden_size,
        hidden=vision.intermediate_size,
        blocks=vision.depth,
        heads=vision.num_heads,
        eps=1e-6,
    ) | {
        "vision_use_gelu": True,
        "vision_spatial_merge_size": vision.spatial_merge_size,
        "vision_is_deepstack_layers": [number in deep for number in range(vision.depth)],
    }
    text = qwen2_vl.mrope_text(config) | {"num_deepstack_layers": len(deep)}
    names = {"model.visual.": "visual."}
    return GgufModel("QWEN3VL", "QWEN3VL", text, values, qwen2_vl.IMAGE, CHATML, cut, names)

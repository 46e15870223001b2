"""Qwen2.5-VL for llama.cpp."""

from __future__ import annotations

from typing import Any

from vlmbuild.families.config_checks import require
from vlmbuild.families.gguf import CHATML, GgufModel, vision_values
from vlmbuild.families.qwen2_vl import gguf as qwen2_vl

_WINDOW = 112
"""The window in llama.cpp, in pixels."""


def model(config: Any) -> GgufModel:
    """Describe a Qwen2.5-VL, whose tower's blocks see windows, and every n-th all of an image."""
    vision = config.vision_config
    qwen2_vl.check_patches(vision)
    full, act, window = list(vision.fullatt_block_indexes), vision.hidden_act, vision.window_size
    every = full[0] + 1 if full else 0
    regular = bool(full) and full == list(range(every - 1, vision.depth, every))
    require(regular, "fullatt_block_indexes", full, "must be every n-th block in llama.cpp. Choose --target onnx.")
    require(window == _WINDOW, "window_size", window, f"must be {_WINDOW}, as in llama.cpp. Choose --target onnx.")
    require(act == "silu", "vision_config.hidden_act", act, "must be silu. Choose --target onnx.")
    values = vision_values(
        config.text_config.hidden_size,
        side=560,
        patch=vision.patch_size,
        width=vision.hidden_size,
        hidden=vision.intermediate_size,
        blocks=vision.depth,
        heads=vision.num_heads,
        eps=1e-6,
    ) | {"vision_use_silu": True, "vision_n_wa_pattern": every}
    text = qwen2_vl.mrope_text(config)
    return GgufModel("QWEN2VL", "QWEN25VL", text, values, qwen2_vl.IMAGE, CHATML, qwen2_vl.cut)

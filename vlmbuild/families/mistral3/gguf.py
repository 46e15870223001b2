"""Mistral 3 for llama.cpp: Pixtral's tower with merged patches."""

from __future__ import annotations

from typing import Any

from vlmbuild.families.config_checks import require
from vlmbuild.families.gguf import INST, GgufModel
from vlmbuild.families.pixtral import gguf as pixtral


def model(config: Any, processor: Any) -> GgufModel:
    """Describe a Mistral 3. Ministral's queries are scaled by their positions."""
    text, values = config.text_config, pixtral.text(config)
    require(
        text.rms_norm_eps == 1e-5,
        "rms_norm_eps",
        text.rms_norm_eps,
        "must be 1e-05, which llama.cpp has in the projector too. Choose --target onnx.",
    )
    rope = text.rope_parameters
    if rope.get("llama_4_scaling_beta"):
        values["attn_temperature_scale"] = float(rope["llama_4_scaling_beta"])
    if rope.get("mscale_all_dim"):
        scales = rope.get("mscale", 1.0), rope["mscale_all_dim"]
        require(scales[0] == 1.0, "mscale", scales[0], "must be 1, as in llama.cpp. Choose --target onnx.")
        values["rope_scaling_yarn_log_mul"] = float(scales[1])
    vision = pixtral.tower(config) | {"vision_spatial_merge_size": config.spatial_merge_size}
    parts = pixtral.cuts(config, pixtral.row_end(processor))
    return GgufModel("MISTRAL3", "PIXTRAL", values, vision, "[IMG]", INST, parts)

"""Unsloth's arguments that have no equivalent here: which are refused, and which make no difference."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from vlmbuild.errors import UsageError

_ERRORS: dict[str, tuple[Any, str]] = {
    "token": (None, "Set the environment variable HF_TOKEN, which the hub's client reads."),
    "rope_scaling": (None, "Positions are scaled as config.json says; change it there."),
    "trust_remote_code": (False, "No code of a checkpoint is ever run."),
    "resize_model_vocab": (None, "The vocabulary is the checkpoint's."),
    "fast_inference": (False, "Serve the merged model (save_pretrained_merged) with vLLM itself."),
    "float8_kv_cache": (False, "There is no such cache."),
    "qat_scheme": (None, "There is no quantization-aware training."),
    "load_in_fp8": (False, "There is no such format; use load_in_4bit or load_in_8bit."),
    "auto_model": (None, "The model class follows from config.json."),
    "bias": ("none", "Only LoRA matrices are trained; biases stay."),
    "layers_pattern": (None, "Name the layers by number: layers_to_transform."),
    "init_lora_weights": (True, "A starts uniform and B at zero."),
    "loftq_config": (None, "Adapters start at zero, not from the quantization error."),
    "ignore_index": (-100, "Labels that are left out are -100."),
    "resize": ("min", "Pass size={'longest_edge': pixels} to vlmbuild.VisionDataCollator."),
    "resize_dimension": (0, "Images keep their shape."),
    "pad_to_multiple_of": (None, "Padding is never computed."),
}
"""Argument -> its default, and what to do instead; any other value would change what is computed."""

_WARNINGS: dict[str, str] = {
    "fix_tokenizer": "the tokenizer is the checkpoint's",
    "fullgraph": "each region is one graph; model.compile(fullgraph=True) insists on it",
    "return_logits": "logits are made when they are asked for",
    "use_exact_model_name": "names are never replaced",
    "gpu_memory_utilization": "it belongs to fast_inference",
    "max_lora_rank": "it belongs to fast_inference",
    "disable_log_stats": "it belongs to fast_inference",
    "unsloth_tiled_mlp": "it saves memory, and is not there",
    "unsloth_force_compile": "compile with model.compile()",
    "offload_embedding": "it saves memory, and is not there",
    "task_type": "it follows from the model",
    "temporary_location": "merging needs no temporary weights",
    "maximum_memory_usage": "merging needs a few megabytes for each core",
    "instruction_part": "responses are found by the chat template",
    "response_part": "responses are found by the chat template",
    "force_match": "responses are found by the chat template",
    "num_proc": "batches are made by the DataLoader's workers",
    "completion_only_loss": "responses are found by the chat template",
    "snap_to_patch_size": "the processor does it",
}
"""Argument -> why it makes no difference here."""


def check_others(caller: str, others: Mapping[str, Any]) -> None:
    """Refuse what would change what is computed, and warn of what would not."""
    for name, value in others.items():
        if name in _ERRORS:
            default, remedy = _ERRORS[name]
            if value != default and value not in ({}, None):
                raise UsageError(f"{caller}: {name}={value!r} has no equivalent. {remedy}")
        elif name in _WARNINGS:
            warnings.warn(f"{caller}: {name} makes no difference: {_WARNINGS[name]}.", stacklevel=3)
        else:
            raise UsageError(f"{caller}: unknown argument {name!r}.")

"""Unsloth's arguments: conversion of those with an equivalent here, refusal of or warning about the others."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlmbuild.adapters.peft_files import CONFIG_FILE
from vlmbuild.checkpoint.source import read_json_object, resolve
from vlmbuild.errors import UsageError
from vlmbuild.quant.dequantized import is_dequantized

_ERRORS: dict[str, tuple[Any, str]] = {
    "token": (None, "Set the environment variable HF_TOKEN, which the hub's client reads."),
    "rope_scaling": (None, "Positions are scaled as config.json says; change it there."),
    "trust_remote_code": (False, "No code of a checkpoint is ever run."),
    "resize_model_vocab": (None, "Call model.resize_token_embeddings(ROWS) after loading."),
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
"""Argument -> its default and the alternative; any other value would change results."""

_WARNINGS: dict[str, str] = {
    "fix_tokenizer": "the tokenizer is the checkpoint's",
    "fullgraph": "each region is one graph; model.compile(fullgraph=True) insists on it",
    "return_logits": "logits are computed when they are read",
    "use_exact_model_name": "names are never replaced",
    "gpu_memory_utilization": "it belongs to fast_inference",
    "max_lora_rank": "it belongs to fast_inference",
    "disable_log_stats": "it belongs to fast_inference",
    "unsloth_tiled_mlp": "not implemented; it only saves memory",
    "unsloth_force_compile": "compile with model.compile()",
    "offload_embedding": "not implemented; it only saves memory",
    "tokenizer": "the processor's files are the artifact's",
    "task_type": "it follows from the model",
    "temporary_location": "merging needs no temporary weights",
    "maximum_memory_usage": "merging needs a few megabytes for each core",
    "instruction_part": "responses are found by the chat template",
    "response_part": "responses are found by the chat template",
    "force_match": "responses are found by the chat template",
    "num_proc": "the DataLoader's workers make batches",
    "completion_only_loss": "responses are found by the chat template",
    "snap_to_patch_size": "the processor does it",
}
"""Argument -> the reason that it makes no difference here."""


def check_others(caller: str, others: Mapping[str, Any]) -> None:
    """Refuse arguments that would change results, and warn about the others."""
    for name, value in others.items():
        if name in _ERRORS:
            default, remedy = _ERRORS[name]
            if value != default and value not in ({}, None):
                raise UsageError(f"{caller}: {name}={value!r} has no equivalent. {remedy}")
        elif name in _WARNINGS:
            warnings.warn(f"{caller}: {name} makes no difference: {_WARNINGS[name]}.", stacklevel=3)
        else:
            raise UsageError(f"{caller}: unknown argument {name!r}. Leave it out, or check its spelling.")


def quantize_format(source: str, revision: str | None, four: bool | None, eight: bool, plain: bool) -> str | None:
    """Return the value of `quantize`; None keeps a source that is quantized already."""
    if eight and plain:
        raise UsageError("load_in_8bit and load_in_16bit (or full_finetuning) exclude each other. Pass one of them.")
    config = resolve(source, revision=revision, weights=False).config().get("quantization_config")
    if isinstance(config, Mapping) and not is_dequantized(config):  # those become plain weights
        if not plain:
            check_formats(source, {"int8" if config.get("load_in_8bit") else "nf4"}, four, eight, plain)
        return "none" if plain else None
    return None if plain else "int8" if eight else None if four is False else "nf4"


def check_formats(source: str, formats: set[str], four: bool | None, eight: bool, plain: bool) -> None:
    """Compare the arguments with the formats of a quantized source or artifact."""
    in_four_bits = bool(formats & {"nf4", "fp4"})
    argument, fits = "", True
    if eight:
        argument, fits = "load_in_8bit", "int8" in formats
    elif plain:
        argument, fits = "load_in_16bit (or full_finetuning)", not formats
    elif four is not None:
        argument, fits = "load_in_4bit" if four else "load_in_4bit=False", in_four_bits is four
    if not fits:
        raise UsageError(
            f"{argument}: {source} holds {', '.join(sorted(formats)) or 'unquantized'} weights. Leave the argument out, or "
            "build another artifact with vlmbuild build --quantize."
        )


def device_name(device_map: Any) -> str:
    """Return the name of the one device in a device map. Raises UsageError for several."""
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map in (None, "auto", "sequential", "balanced"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device_map, int):
        return f"cuda:{device_map}"
    if isinstance(device_map, str | torch.device):
        return str(device_map)
    raise UsageError(f"device_map {device_map!r}: a model is on one device. Pass its name, or 'auto'.")


def base_of(adapter: Path) -> str:
    """Return the base model that an adapter's config names. Raises UsageError without one."""
    try:
        config = read_json_object(adapter / CONFIG_FILE, "Is it an adapter in PEFT's format?")
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
    except json.JSONDecodeError as error:
        raise UsageError(f"{adapter / CONFIG_FILE} is not JSON: {error}") from error
    if not base:
        raise UsageError(
            f"{adapter} does not name its base model. Load the base with from_pretrained, then "
            "vlmbuild.load_adapter(model, directory)."
        )
    return f"{base}@{revision}" if revision else str(base)

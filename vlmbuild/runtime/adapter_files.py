"""Adapters on disk in PEFT's format: PEFT reads what is written here, and what PEFT writes is read here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vlmbuild.errors import OutputError, SourceError, UsageError
from vlmbuild.runtime.model import unwrap

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UNSUPPORTED = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
_SLOT = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])\.default\.weight")


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write the model's LoRA weights.

    Args:
        model: Has adapters; may be compiled.
        directory: Made if it is missing; an adapter in it is replaced.

    Raises:
        UsageError: The model has no adapter, or is not one from `vlmbuild.load`.
        OutputError: The directory cannot be written.
    """
    model = unwrap(model)
    tensors = {
        f"{_PREFIX}{match['module']}.{match['part']}.weight": parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if (match := _SLOT.fullmatch(name))
    }
    if model.adapter is None or not tensors:
        raise UsageError("The model has no adapter to save; call vlmbuild.add_lora(model, r=16) first.")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": model.adapter.r,
        "lora_alpha": model.adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.removeprefix(_PREFIX).partition(".lora_")[0] for name in tensors}),
        "inference_mode": True,
    }
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})
        (path / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"The adapter cannot be written to {path}: {error}. Choose a directory with space."
        ) from error


def read_adapter(directory: str | Path) -> tuple[int, float, dict[str, torch.Tensor]]:
    """(rank, alpha, tensors by the model's parameter names) of an adapter in PEFT's format.

    Raises:
        SourceError: A file is missing or malformed, or the adapter is not plain LoRA.
    """
    path = Path(directory)
    try:
        config = json.loads((path / CONFIG_FILE).read_text())
        tensors = load_file(path / WEIGHTS_FILE)
        rank, alpha, kind = int(config["r"]), float(config["lora_alpha"]), config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SourceError(
            f"{path} is not a readable adapter ({type(error).__name__}: {error}). It must hold {CONFIG_FILE} and "
            f"{WEIGHTS_FILE} as PEFT writes them."
        ) from error
    unsupported = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        unsupported.append(f"init_lora_weights={config['init_lora_weights']!r}")  # it changes the base weights
    if kind != "LORA" or unsupported or rank < 1:
        found = f"{kind} with {', '.join(unsupported)}" if unsupported else f"{kind} of rank {rank}"
        raise SourceError(f"{path}: only plain LoRA adapters can be loaded, not {found}. Merge it with PEFT first.")
    named = {
        name.removeprefix(_PREFIX)
        .replace(".lora_A.weight", ".lora_A.default.weight")
        .replace(".lora_B.weight", ".lora_B.default.weight"): tensor
        for name, tensor in tensors.items()
    }
    return rank, alpha, named

"""Adapters on disk that do something, for the tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import vlmbuild
from vlmbuild.demo.digits import Digits
from vlmbuild.demo.task import LARGEST, training_batch


def fill_adapter(model, std: float = 0.05):
    """Give the adapter's second matrices random values, since they start at zero; returns the model."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    return model


def answer_logits(model, processor):
    """Return the logits of the attended tokens of three samples of digits."""
    batch = training_batch(processor, LARGEST, Digits("held_out", 3).take(3))
    batch.pop("labels", None)
    attended = batch["attention_mask"].bool()
    with torch.no_grad():
        return model.eval()(**batch).logits[attended]


def write_adapter(artifact: Path, directory: Path, std: float = 0.05, **options) -> Path:
    """Write a LoRA adapter of an artifact whose B and modules trained whole differ from their initial values."""
    model, _ = vlmbuild.load(artifact)
    vlmbuild.add_lora(model, **{"r": 4, "alpha": 12, **options})
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters():
            if "lora_A" not in name:
                parameter.add_(torch.randn_like(parameter) * std)
    vlmbuild.save_adapter(model, directory)
    return directory


def edit_adapter_config(directory: Path, **changes) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_adapter(directory: Path, change) -> None:
    """Edit an adapter: `change` takes the tensors by name, and changes them in place or returns others in a new dict."""
    tensors = load_file(directory / "adapter_model.safetensors")
    changed = change(tensors)
    tensors = changed if isinstance(changed, dict) else tensors
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "adapter_model.safetensors")

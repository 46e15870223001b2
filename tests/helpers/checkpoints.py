"""Checkpoints on disk for the tests, in the layouts that are published."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vlmbuild.checkpoint.source import PROCESSOR_FILES
from vlmbuild.zoo import ZOO


def write_checkpoint(reference, directory: Path) -> Path:
    """transformers' own layout, with the zoo's processor (its special tokens have other ids, which no test here mixes)."""
    reference.save_pretrained(directory)
    for name in PROCESSOR_FILES:
        if (ZOO["qwen2-vl-digits"] / name).exists():
            shutil.copy(ZOO["qwen2-vl-digits"] / name, directory)
    return directory


def copied(checkpoint: Path, target: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(checkpoint, target))


def edit_config(directory: Path, change) -> None:
    file = directory / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit_weights(directory: Path, change) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def as_shards(directory: Path, rename=lambda name: name) -> None:
    """Two shards and an index in place of the single file."""
    tensors = {rename(name): tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    names = sorted(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, directory / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, shard)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()


def interruptible() -> None:
    """For `preexec_fn`: what a shell starts in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def dequantized(model):
    """A transformers model whose bitsandbytes layers hold exactly what their 4-bit weights stand for."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            exact = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = exact.float()
            if module.bias is not None:
                linear.bias.data = module.bias.data.float()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
    return model

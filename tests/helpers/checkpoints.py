"""Checkpoints on disk for the tests, in the layouts that are published."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import matrix
import pytest
import torch
from safetensors.torch import load_file, save_file
from setups.base import with_few_tokens

from vlmbuild.checkpoint.source import PROCESSOR_FILES
from vlmbuild.zoo import ZOO

QUICK = ("qwen2-vl-digits", "mllama-digits", "pixtral-digits")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in ZOO]
"""The zoo's names as parameters of tests that build or run the checkpoints; some are slow, for the sake of the others."""


def write_checkpoint(reference, directory: Path) -> Path:
    """Save transformers' own layout, with the zoo's processor (its special tokens have other ids; no test here mixes them)."""
    reference.save_pretrained(directory)
    for name in PROCESSOR_FILES:
        if (ZOO["qwen2-vl-digits"] / name).exists():
            shutil.copy(ZOO["qwen2-vl-digits"] / name, directory)
    return directory


def write_untrained(family: str, directory: Path, **changes) -> Path:
    """Save a tiny random model of a family that the zoo lacks, with its processor and a tokenizer of single characters;
    `changes` are other fields of its text_config."""
    setup = matrix.SETUPS[family](False)
    whole, processor = setup.processor.tokenizer, with_few_tokens(setup.processor)
    few = processor.tokenizer

    def renumbered(values):
        ids = {key: value for key, value in values.items() if "token_" in key and isinstance(value, int)}
        return {key: few.convert_tokens_to_ids(whole.convert_ids_to_tokens(number)) for key, number in ids.items()}

    text = setup.values["text_config"] | changes
    ends = {f"{name}_token_id": getattr(few, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**text, **renumbered(text), **ends, "vocab_size": len(few)}
    values = {**setup.values, **renumbered(setup.values), "text_config": text}
    matrix.reference(matrix.replace(setup, values=values)).eval().save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def write_tiny(family: str, directory: Path) -> Path:
    """Save a family's tiny model in bfloat16, with its processor."""
    setup = matrix.tiny(family)
    matrix.reference(setup).to(torch.bfloat16).save_pretrained(directory)
    setup.processor.save_pretrained(directory)
    return directory


def copied(checkpoint: Path, target: Path) -> Path:
    """Copy a checkpoint that a test may spoil."""
    return Path(shutil.copytree(checkpoint, target))


def edit_config(directory: Path, change) -> None:
    file = directory / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit_processor(directory: Path, change) -> None:
    file = directory / "processor_config.json"
    values = json.loads(file.read_text())
    change(values["image_processor"])
    file.write_text(json.dumps(values))


def edit_weights(directory: Path, change) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def as_shards(directory: Path, rename=lambda name: name) -> None:
    """Replace the single file by two shards and an index."""
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
    """Restore SIGINT, for `preexec_fn`: a process that a shell starts in the background ignores it, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def dequantized(model):
    """Replace a transformers model's bitsandbytes layers by linear layers with exactly the values of their 4-bit weights."""
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

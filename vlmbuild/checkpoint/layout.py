"""Refuse directories that hold something else than one checkpoint, and say how to make one of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from vlmbuild.artifact.files import read_file
from vlmbuild.artifact.weights_reader import INDEX, SINGLE
from vlmbuild.errors import SourceError
from vlmbuild.util.text import listed

ADAPTER_CONFIG = "adapter_config.json"
_MAX_CONFIG_BYTES = 2**20
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_FSDP = re.compile(r".*\.distcp|\.metadata|pytorch_model_fsdp_\d+|.*_rank_\d+.*\.(pt|bin)")
_DEEPSPEED = re.compile(r"global_step\d+|zero_to_fp32\.py|.*(optim|model)_states\.pt")


def check_no_adapter(directory: Path) -> None:
    """Raise SourceError for the directory of an adapter, alone or beside a model."""
    adapter = directory / ADAPTER_CONFIG
    if not adapter.is_file():
        return
    if (directory / SINGLE).exists() or (directory / INDEX).exists():
        raise SourceError(
            f"{directory} holds a model and an adapter ({ADAPTER_CONFIG}), and transformers would load both. Move the "
            "adapter's files to a folder of their own; to merge it, pass that folder with --adapter."
        )
    try:
        base = json.loads(read_file(adapter, _MAX_CONFIG_BYTES)).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    raise SourceError(
        f"{directory} is an adapter, not a model. Name its base model ({base or 'see its training'}) as the source, and "
        f"pass --adapter {directory}."
    )


def check_weight_files(directory: Path) -> None:
    """Raise SourceError for two sets of weights, shards of a training run, and files under other names."""
    names = sorted(entry.name for entry in directory.iterdir())
    if SINGLE in names and INDEX in names:
        raise SourceError(
            f"{directory} holds two sets of weights, {SINGLE} and the shards of {INDEX}. Move one of them away."
        )
    if SINGLE in names or INDEX in names:
        return
    others = [name for name in names if name.endswith(".safetensors")]
    if any(map(_SHARD.fullmatch, others)):
        raise SourceError(
            f"{directory} holds shards ({listed(others, 3)}) without their index {INDEX}. Download it too."
        )
    if others:
        raise SourceError(
            f"{directory} has neither {SINGLE} nor {INDEX}, but {listed(others, 3)}. If that is the whole model, rename it to "
            f"{SINGLE}."
        )
    if found := [name for name in names if _DEEPSPEED.fullmatch(name)]:
        raise SourceError(
            f"{directory} holds shards of a DeepSpeed run ({listed(found, 3)}). Join them where they were written: "
            "python zero_to_fp32.py . OUT --safe_serialization"
        )
    if found := [name for name in names if _FSDP.fullmatch(name)]:
        raise SourceError(
            f"{directory} holds shards of an FSDP run ({listed(found, 3)}). Join them: accelerate merge-weights DIR OUT"
        )


def check_strays(directory: Path, files: Iterable[Path]) -> None:
    """Raise SourceError for shards that the index does not list: they belong to another set of weights."""
    used = {file.name for file in files}
    strays = sorted(
        entry.name for entry in directory.iterdir() if _SHARD.fullmatch(entry.name) and entry.name not in used
    )
    if strays:
        raise SourceError(
            f"{directory} holds two sets of weights: {listed(strays, 3)} belong to none of the files in use. Move them away."
        )


def check_no_prefix(
    directory: Path, names: Collection[str], module_name: Callable[[str], str], embeddings: str
) -> None:
    """Raise SourceError when all tensors have a prefix that a wrapper added, with the option that removes it.

    Args:
        directory: Their directory, for messages.
        names: Names of tensors in files.
        module_name: Translates such a name to the model's.
        embeddings: The model's name of the table of embeddings.
    """
    if any(module_name(name) == embeddings for name in names):
        return
    for name in (name for name in names if name.endswith("embed_tokens.weight")):
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) + "." for length in range(1, len(parts)))
        prefix = next((prefix for prefix in prefixes if module_name(name.removeprefix(prefix)) == embeddings), None)
        if prefix is not None and all(other.startswith(prefix) for other in names):
            raise SourceError(
                f"All names of tensors in {directory} begin with {prefix!r}, which a wrapper such as DataParallel, "
                f"torch.compile or PEFT added. Pass --strip-prefix {prefix}"
            )

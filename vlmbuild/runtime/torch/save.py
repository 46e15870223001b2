"""Saving of trained models as checkpoints: what a model was built from, with the parameters as they are now."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor

from vlmbuild.adapters.peft_files import WEIGHTS_FILE, whole
from vlmbuild.artifact.hub import is_extra
from vlmbuild.artifact.weights_reader import SINGLE, CheckpointWeights
from vlmbuild.errors import OutputError, UsageError
from vlmbuild.runtime.torch.program_model import ProgramModel
from vlmbuild.runtime.torch.vocabulary import set_config_rows
from vlmbuild.util.dtypes import dtype_name

_NOT_COPIED = {"config.json", "manifest.json", "SHA256SUMS"}


def write_checkpoint(
    model: ProgramModel, directory: Path, parameters: Mapping[str, Tensor], shard_size: int | str
) -> None:
    """Write a checkpoint in transformers' layout, with published names.

    Args:
        model: A loaded model; tensors that cannot be trained come from its artifact.
        directory: Created if missing.
        parameters: Parameters by module name.
        shard_size: Most bytes of a file.

    Raises:
        UsageError: The model was not loaded from an artifact.
        OutputError: The directory cannot be written.
    """
    if model.path is None:
        raise UsageError(
            "The model has no artifact that its config and processor could come from. Load it with vlmbuild.load."
        )
    weights = CheckpointWeights(model.path)
    trained = {model.family.stored_name(name): parameter for name, parameter in parameters.items()}
    tensors = {name: whole(trained[name]) if name in trained else weights.map(name) for name in weights.tensors}
    config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    if model.resized:
        set_config_rows(config, model.vocabulary)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(tensors, directory, max_shard_size=shard_size, metadata={"format": "pt"})
        config["dtype"] = dtype_name(model.dtype)
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in sorted(model.path.iterdir()):
            # Signatures and model cards beside an artifact are about other weights.
            skipped = file.name in _NOT_COPIED or is_extra(file.name, ()) or ".safetensors" in file.name
            if file.is_file() and not skipped:
                shutil.copy(file, directory)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"The model cannot be written to {directory}: {error}. Check the permissions and the free space, or choose "
            "another directory."
        ) from error


def link_weights(directory: Path) -> None:
    """Give an adapter's file the name that trainers resume from, without storing it twice."""
    link = directory / SINGLE
    try:
        link.unlink(missing_ok=True)
        try:
            os.link(directory / WEIGHTS_FILE, link)
        except OSError:  # a file system without hard links
            shutil.copy(directory / WEIGHTS_FILE, link)
    except OSError as error:
        raise OutputError(
            f"{link} cannot be written: {error}. Check the permissions and the free space, or choose another directory."
        ) from error

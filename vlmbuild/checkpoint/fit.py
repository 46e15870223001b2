"""Compare a checkpoint's tensors with the program of its config, before any is read."""

from __future__ import annotations

import re

from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.errors import SourceError
from vlmbuild.ir.linear_layers import linear_layers
from vlmbuild.ir.program import Program
from vlmbuild.util.text import listed

_IGNORED_SOURCE_TENSORS = re.compile(r".*rotary_emb\.inv_freq|.*rotary_pos_emb\.inv_freq")
"""Buffers that old checkpoints store; they follow from the config."""


def check_weights(program: Program, checkpoint: Checkpoint) -> None:
    """Compare a checkpoint's tensors with the program, before any is read.

    Raises:
        SourceError: Tensors are missing, left over, or of another shape than the config says; they are named.
    """
    family, tensors, directory = checkpoint.family, checkpoint.tensors, checkpoint.source.directory
    needed = {name: slot for name, slot in program.slots() if slot.kind == "parameter"}
    missing = [family.stored_name(name) for name in sorted(set(needed) - set(tensors))]
    if missing:
        raise SourceError(
            f"{directory} lacks {listed(missing, 5)}, which config.json asks for. The checkpoint is incomplete, or "
            "its config.json belongs to another model."
        )
    for name, slot in needed.items():
        if tensors[name].shape != slot.shape:
            raise SourceError(
                f"{directory}: tensor {family.stored_name(name)} has shape {list(tensors[name].shape)}, but "
                f"config.json asks for {list(slot.shape)}. The weights and config.json do not belong together."
            )
        dtype = tensors[name].dtype
        if tensors[name].format is None and (not dtype.is_floating_point or dtype.itemsize == 1):
            raise SourceError(
                f"{directory}: tensor {family.stored_name(name)} is {dtype}, and config.json does not "
                "say that it is quantized. Get the original checkpoint."
            )
    linear = {f"{layer.module}.weight" for layer in linear_layers(program) if not layer.shared}
    for name, tensor in tensors.items():
        if tensor.format is not None and name in needed and name not in linear:
            raise SourceError(
                f"{directory}: {tensor.name} is quantized, but it is not the weight of a linear layer. "
                "Get the original checkpoint."
            )
    extra = [
        family.stored_name(name)
        for name in sorted(set(tensors) - set(needed) - set(program.ties))
        if not _IGNORED_SOURCE_TENSORS.fullmatch(name) and not _is_zero_bias(checkpoint, name)
    ]
    if extra:
        raise SourceError(
            f"{directory} holds {listed(extra, 5)}, which a model with this config.json does not have. "
            "Building would lose them; check num_hidden_layers and depth."
        )


def _is_zero_bias(checkpoint: Checkpoint, name: str) -> bool:
    """Tell whether this is a bias of zeros of a dequantized layer: AutoGPTQ writes one where the model has none."""
    weight = checkpoint.tensors.get(f"{name.removesuffix('.bias')}.weight")
    if not name.endswith(".bias") or weight is None or weight.dequantized is None:
        return False
    return not checkpoint.weights.read(checkpoint.tensors[name].name).any()

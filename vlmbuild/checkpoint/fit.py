"""Hold a checkpoint's tensors against the program of its config, before any is read."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.checkpoint.tensors import SourceTensor
from vlmbuild.errors import SourceError
from vlmbuild.families import Family
from vlmbuild.ir.linear_layers import linear_layers
from vlmbuild.ir.program import Program

_IGNORED_SOURCE_TENSORS = re.compile(r".*rotary_emb\.inv_freq|.*rotary_pos_emb\.inv_freq")
"""Buffers that old checkpoints store; they follow from the config."""


def check_weights(
    program: Program, family: Family, weights: CheckpointWeights, tensors: Mapping[str, SourceTensor]
) -> None:
    """Hold a checkpoint's tensors against the program, before any is read.

    Raises:
        SourceError: Tensors are missing, left over, or of another shape than the config says; they are named.
    """
    needed = {name: slot for name, slot in program.slots() if slot.kind == "parameter"}
    missing = sorted(set(needed) - set(tensors))
    if missing:
        raise SourceError(
            f"{weights.directory} lacks {_listed(missing, family)}, which config.json asks for. The checkpoint is "
            "incomplete, or its config.json belongs to another model."
        )
    for name, slot in needed.items():
        if tensors[name].shape != slot.shape:
            raise SourceError(
                f"{weights.directory}: tensor {family.stored_name(name)} has shape {list(tensors[name].shape)}, but "
                f"config.json asks for {list(slot.shape)}. The weights and config.json do not belong together."
            )
        if tensors[name].format is None and not tensors[name].dtype.is_floating_point:
            raise SourceError(
                f"{weights.directory}: tensor {family.stored_name(name)} is {tensors[name].dtype}, and config.json does not "
                "say that it is quantized. Get the original checkpoint."
            )
    linear = {f"{layer.module}.weight" for layer in linear_layers(program) if not layer.shared}
    for name, tensor in tensors.items():
        if tensor.format is not None and name in needed and name not in linear:
            raise SourceError(
                f"{weights.directory}: {tensor.name} is quantized, but it is not the weight of a linear layer."
            )
    extra = sorted(
        name for name in set(tensors) - set(needed) - set(program.ties) if not _IGNORED_SOURCE_TENSORS.fullmatch(name)
    )
    if extra:
        raise SourceError(
            f"{weights.directory} holds {_listed(extra, family)}, which a model with this config.json does not have. "
            "Building would lose them; check num_hidden_layers and depth."
        )


def _listed(names: list[str], family: Family) -> str:
    shown = ", ".join(family.stored_name(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more tensors" if len(names) > 5 else "")

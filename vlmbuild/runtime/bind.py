"""Bind a stored program to its weights: the layout of trainable artifacts, which compiled ones share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmbuild.artifact.canonical import parse_canonical
from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.errors import IncompatibleError, SourceError
from vlmbuild.families import Family, family_named
from vlmbuild.ir.program import Program, Region, Slot, WeightRecipe, join
from vlmbuild.ir.serialize import PROGRAM_FILE, from_json
from vlmbuild.ops import PLAIN_LINEAR
from vlmbuild.runtime.torch.model import VisionLanguageModel
from vlmbuild.util.dtypes import dtype_name
from vlmbuild.util.text import listed

_MARK = torch.ops.vlmbuild.linear_packed.default
Read = Callable[[str], bytes]
"""Content of an artifact's file, by its path."""


def read_program(reader: ArtifactReader) -> Program:
    """Read an artifact's program. Raises IntegrityError, IncompatibleError."""
    return _program(reader.read)


def bind_artifact(reader: ArtifactReader, dtype: torch.dtype) -> VisionLanguageModel:
    """Bind an artifact's program to its weights, with its processor.

    Raises:
        IntegrityError: A file differs from the manifest.
        IncompatibleError: Files are intact and do not fit each other.
    """
    stored = getattr(torch, str(reader.manifest.recipe.get("dtype")), dtype)
    model = _bind(reader.read, reader.path, dtype, stored, reader.open)
    model.processor = artifact_processor(reader, model.family)
    return model


def artifact_processor(reader: ArtifactReader, family: Family) -> Any:
    """Load an artifact's processor from verified bytes. Raises IntegrityError, SourceError."""
    with reader.copied("config", "processor") as directory:
        processor = family.processor(directory)
    for part in vars(processor).values():
        if getattr(part, "name_or_path", None) == str(directory):
            part.name_or_path = part.init_kwargs["name_or_path"] = str(reader.path)
    return processor


def bind_directory(directory: Path, dtype: torch.dtype) -> VisionLanguageModel:
    """Bind the program and weights of an artifact that is being built. Raises IncompatibleError."""
    return _bind(lambda name: (directory / name).read_bytes(), directory, dtype, dtype)


def _program(read: Read) -> Program:
    return from_json(parse_canonical(read(PROGRAM_FILE), where=PROGRAM_FILE))


def _bind(
    read: Read,
    directory: Path,
    dtype: torch.dtype,
    stored: torch.dtype,
    open_name: Callable[[str], int] | None = None,
) -> VisionLanguageModel:
    """Bind a program to its weights.

    Args:
        read: Reads a file of the artifact.
        directory: The artifact.
        dtype: The compute dtype.
        stored: Dtype of tensors that are not quantized.
        open_name: Opens a file of the artifact; by default in the directory.
    """
    program = _program(read)
    family = family_named(program.family)
    try:
        config = family.config(json.loads(read("config.json")))
        weights = CheckpointWeights(directory, open_name)
        _check_stored(program, family, weights, stored)
        tensors = _read_tensors(program, family, weights)
        _unmark(program)
        return VisionLanguageModel(program, family, config, tensors, dtype)
    except SourceError as error:
        raise IncompatibleError(f"The files of {directory} do not belong together: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise IncompatibleError(
            f"The program of {directory} does not fit its weights: {error}. Build the artifact again."
        ) from error


def _unmark(program: Program) -> None:
    """Make plain linear layers, which can train, of those whose packed weights are dequantized as they are read."""
    for region in program.regions.values():
        marked = [node for node in region.graph.graph.nodes if node.target is _MARK]
        for node in marked:
            node.target, node.args = PLAIN_LINEAR, node.args[:3]
        if marked:
            region.recipes = ()
            region.graph.recompile()


def _check_stored(program: Program, family: Family, weights: CheckpointWeights, dtype: torch.dtype) -> None:
    """Raise IncompatibleError for a tensor that no build of the program stores, or stores in another dtype."""
    expected: dict[str, torch.dtype] = {}
    for name, shape, form in program.source_weights():
        stored = family.stored_name(name)
        if form is None:
            expected[stored] = dtype
        else:
            parts = form.parts(stored.removesuffix(".weight"), shape, dtype)
            expected |= {part.name: part.dtype for part in parts}
    if extra := sorted(weights.tensors.keys() - expected):
        raise IncompatibleError(
            f"The weights of {weights.directory} hold {listed(extra)}, which its program does not use. Build it again."
        )
    for name, info in weights.tensors.items():
        if info.dtype != expected[name]:
            raise IncompatibleError(
                f"{name} of {weights.directory} is stored as {dtype_name(info.dtype)}, and its program needs "
                f"{dtype_name(expected[name])}. Build it again."
            )


def _read_tensors(program: Program, family: Family, weights: CheckpointWeights) -> dict[str, Tensor]:
    """Map every stored slot, by module name; shapes must be the program's."""
    tensors: dict[str, Tensor] = {}
    for region in program.regions.values():
        for instance in region.instances:
            tensors.update(instance_tensors(region, instance, family, weights))
    for name, slot in program.slots():
        if slot.kind != "constant":
            _check(name, slot, tensors.get(name))
    return tensors


def instance_tensors(
    region: Region, instance: str, family: Family, weights: CheckpointWeights
) -> list[tuple[str, Tensor]]:
    """Map an instance's stored slots from an artifact's files, as (module name, tensor)."""
    packed = {recipe.source for recipe in region.recipes}
    found = [
        (join(instance, slot.name), weights.map(family.stored_name(join(instance, slot.name))))
        for slot in region.slots
        if slot.kind == "parameter" and slot.name not in packed
    ]
    for recipe in region.recipes:
        found += _quantized(join(instance, recipe.source), recipe, family, weights)
    return found


def _quantized(name: str, recipe: WeightRecipe, family: Family, weights: CheckpointWeights) -> list[tuple[str, Tensor]]:
    """Return a quantized weight's slots from the tensors that its format stores."""
    stored = recipe.format.load(weights, family.stored_name(name).removesuffix(".weight"), recipe.shape)
    return [(name + suffix, tensor) for suffix, tensor in stored.items()]


def _check(name: str, slot: Slot, tensor: Tensor | None) -> None:
    if tensor is None:
        raise IncompatibleError(f"The artifact's weights lack {name}, which its program needs. Build it again.")
    if tuple(tensor.shape) != slot.shape:
        raise IncompatibleError(
            f"{name} has shape {tuple(tensor.shape)} in the weights and {slot.shape} in the program. Build it again."
        )

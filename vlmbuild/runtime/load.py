"""Open a verified artifact: program, weights and processor, without what built it and without running anything from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from vlmbuild.artifact.manifest import Manifest, parse_canonical
from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.errors import IncompatibleError, SourceError, TrustError, UsageError
from vlmbuild.families import Family, family_named
from vlmbuild.ir.program import Program, Region, Slot, WeightRecipe, join
from vlmbuild.ir.serialize import PROGRAM_FILE, from_json
from vlmbuild.recipe import DTYPES
from vlmbuild.runtime.onnx.session import check_provider
from vlmbuild.runtime.torch.model import VisionLanguageModel
from vlmbuild.util.devices import available_device
from vlmbuild.util.validation import one_of

GENERATION_CONFIG = "generation_config.json"


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    verify: bool = True,
    trust: Collection[str] = (),
) -> tuple[Any, Any]:
    """Open an artifact.

    Weights on a CPU stay mapped from the artifact's files while the model lives. To replace an artifact in use, build with
    `overwrite`, which leaves the old files to those who have them open; never write into its files.

    Args:
        path: The artifact's directory.
        device: Where the weights go; None is the CPU.
        dtype: Compute dtype; None is the one that the artifact was built with.
        verify: Check every file against the manifest first. Turn it off only for an artifact just verified.
        trust: ("code",) allows the target aoti, whose compiled code runs with the caller's rights. The others hold none.

    Returns:
        The model, a `VisionLanguageModel` in evaluation mode, an `OnnxVisionLanguageModel` or a
        `CompiledVisionLanguageModel`, and the processor.

    Raises:
        IntegrityError: A file is not what the manifest says.
        TrustError: The artifact holds code, and `trust` does not allow it.
        IncompatibleError: The artifact is of another target, newer than this vlmbuild, or compiled for another machine.
        DeviceError: The device is not available here.
        UsageError: The dtype is none that a model computes in.
    """
    if dtype is not None:
        one_of("dtype", str(dtype).removeprefix("torch."), DTYPES)
    reader = ArtifactReader(path, verify=False)
    if reader.manifest.target == "onnx":
        return _load_onnx(reader, torch.device(device or "cpu").type, dtype, verify=verify)
    chosen_device = available_device(device)
    if reader.manifest.target == "aoti":
        return _load_compiled(reader, chosen_device, dtype, trust, verify=verify)
    if reader.manifest.target != "trainable":
        raise IncompatibleError(
            f"{path} has target {reader.manifest.target!r}; this vlmbuild loads 'trainable', 'onnx' and 'aoti'."
        )
    # Files are hashed by other threads meanwhile. Nothing is run from them, and nothing returned before they are proven.
    with reader.verifying() if verify else nullcontext():
        model = _bind(reader.read, reader.path, _dtype(dtype, reader.manifest))
        model.processor = model.family.processor(reader.path)
        model.path, model.source = reader.path, str(path)
        if reader.manifest.entry(GENERATION_CONFIG) is not None:
            model.generation_config = _generation_config(reader)
    return model.eval().to(chosen_device), model.processor


def _load_onnx(
    reader: ArtifactReader, device: str, dtype: str | torch.dtype | None, *, verify: bool
) -> tuple[Any, Any]:
    """The models of an ONNX artifact, which other code parses: so only once all files are proven."""
    from vlmbuild.runtime.onnx.model import open_model

    _check_built(reader, dtype)
    check_provider(device)
    if verify:
        reader = ArtifactReader(reader.path)
    model = open_model(reader.path, device)
    if verify:
        reader.check_unchanged()
    if reader.manifest.entry(GENERATION_CONFIG) is not None:
        model.generation_config = _generation_config(reader)
    return model, model.processor


def _load_compiled(
    reader: ArtifactReader,
    device: torch.device,
    dtype: str | torch.dtype | None,
    trust: Collection[str],
    *,
    verify: bool,
) -> tuple[Any, Any]:
    """The model of an artifact with compiled code, none of which is opened before all files are proven."""
    from vlmbuild.runtime.aoti.code import adopt_code
    from vlmbuild.runtime.aoti.model import CompiledVisionLanguageModel

    check_trust(reader.path, reader.manifest, trust)
    _check_built(reader, dtype)
    if device.type != "cpu":
        raise IncompatibleError(
            f"{reader.path} was compiled for CPUs, and cannot run on {device}. Build the trainable target."
        )
    if verify:
        reader = ArtifactReader(reader.path)
    graphs = _bind(reader.read, reader.path, _dtype(None, reader.manifest)).eval()
    graphs.processor = graphs.family.processor(reader.path)
    adopt_code(graphs, reader.read, str(reader.path))
    model = CompiledVisionLanguageModel(graphs, reader.path)
    if verify:
        reader.check_unchanged()
    if reader.manifest.entry(GENERATION_CONFIG) is not None:
        model.generation_config = _generation_config(reader)
    return model, model.processor


def check_trust(path: Path, manifest: Manifest, trust: Collection[str]) -> None:
    """Raise TrustError for an artifact with code that the caller has not allowed, however its files are called."""
    if (manifest.trust["code"] or manifest.target == "aoti") and "code" not in trust:
        raise TrustError(
            f"{path} holds compiled code, which would run with your rights. If you trust those who built it, load it with "
            'trust=("code",), or on the command line with --trust-code.'
        )


def bind_directory(directory: Path, dtype: torch.dtype) -> VisionLanguageModel:
    """The program and weights of an artifact that is being built. Raises IncompatibleError."""
    return _bind(lambda name: (directory / name).read_bytes(), directory, dtype)


def _check_built(reader: ArtifactReader, dtype: str | torch.dtype | None) -> None:
    built = reader.manifest.recipe.get("dtype")
    if dtype is not None and str(dtype).removeprefix("torch.") != built:
        raise UsageError(
            f"An artifact of target {reader.manifest.target} computes in the dtype that it was built with, {built}. Leave "
            "dtype out."
        )


def read_program(reader: ArtifactReader) -> Program:
    """The program of an artifact."""
    return _program(reader.read)


def _program(read: Callable[[str], bytes]) -> Program:
    return from_json(parse_canonical(read(PROGRAM_FILE), where=PROGRAM_FILE))


def _generation_config(reader: ArtifactReader) -> GenerationConfig:
    """The checkpoint's own ends and defaults of generation."""
    try:
        return GenerationConfig.from_dict(json.loads(reader.read(GENERATION_CONFIG)))
    except (TypeError, ValueError, AttributeError) as error:
        raise IncompatibleError(
            f"{GENERATION_CONFIG} of {reader.path} cannot be used: {error}. Build it again."
        ) from error


def _bind(read: Callable[[str], bytes], directory: Path, dtype: torch.dtype) -> VisionLanguageModel:
    """The program with its weights. Files that are intact and still do not fit each other are an incompatible artifact."""
    program = _program(read)
    family = family_named(program.family)
    try:
        config = family.config(json.loads(read("config.json")))
        tensors = _read_tensors(program, family, CheckpointWeights(directory))
        return VisionLanguageModel(program, family, config, tensors, dtype)
    except SourceError as error:
        raise IncompatibleError(f"The files of {directory} do not belong together: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise IncompatibleError(
            f"The program of {directory} does not fit its weights: {error}. Build the artifact again."
        ) from error


def _dtype(dtype: str | torch.dtype | None, manifest: Manifest) -> torch.dtype:
    name = str(dtype or manifest.recipe.get("dtype")).removeprefix("torch.")
    one_of("dtype", name, DTYPES)
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def _read_tensors(program: Program, family: Family, weights: CheckpointWeights) -> dict[str, Tensor]:
    """Every stored slot by module name; shapes must be the program's."""
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
    """(module name, tensor) of an instance's stored slots, mapped from an artifact's files."""
    found = [
        (join(instance, slot.name), weights.map(family.stored_name(join(instance, slot.name))))
        for slot in region.slots
        if slot.kind == "parameter"
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

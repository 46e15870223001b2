"""Open a verified artifact: program, weights and processor, without what built it and without running anything from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from vlmbuild.adapters.identity import Base
from vlmbuild.artifact.hub import artifact_directory
from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.paths import GENERATION_CONFIG
from vlmbuild.artifact.reader import ArtifactReader, check_id, read_again_if_replaced
from vlmbuild.errors import IncompatibleError, TrustError, UsageError
from vlmbuild.recipe import DTYPES
from vlmbuild.runtime.bind import bind_artifact
from vlmbuild.runtime.hf import Model
from vlmbuild.runtime.torch.model import VisionLanguageModel
from vlmbuild.util.devices import available_device, named_device
from vlmbuild.util.dtypes import dtype_name
from vlmbuild.util.validation import one_of

Device = str | torch.device | None


@dataclass(frozen=True, slots=True)
class Opener:
    """How artifacts of one target are opened.

    Attributes:
        open: (reader, device, dtype) -> model with its processor.
        device: Checks the caller's device. Raises DeviceError, IncompatibleError.
        any_dtype: True if the model can compute in another dtype than it was built with.
        on_gpu: True if `best_device` puts the model on a GPU.
        runs_code: True if the artifact holds machine code, which needs the caller's trust.
        proven_first: True if code of others parses or runs its files, so that all are verified before one is opened. Files
            that only we parse are verified in other threads in the meantime.
    """

    open: Callable[[ArtifactReader, torch.device, torch.dtype], Model]
    device: Callable[[Device], torch.device] = available_device
    any_dtype: bool = False
    on_gpu: bool = False
    runs_code: bool = False
    proven_first: bool = True


def load(
    path: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    verify: bool = True,
    expected_id: str | None = None,
    allow_hardlinks: bool = False,
    trust: Collection[str] = (),
) -> tuple[Model, Any]:
    """Open an artifact.

    Weights on a CPU stay mapped from the artifact's files while the model lives. To replace an artifact in use, build with
    `overwrite`, which leaves the old files to those who have them open; never write into its files. A directory that is
    replaced while it is read is read again from the start, a few times.

    Args:
        path: The artifact's directory, or the hub id ("owner/name", "owner/name@revision") of one, which is downloaded into
            the hub's cache.
        revision: Branch, tag or commit of a hub id without its own.
        device: Where the weights go; None is the CPU.
        dtype: Compute dtype; None is the one that the artifact was built with.
        verify: Check every file against the manifest before returning. Turn it off only for an artifact just verified.
        expected_id: The id that the artifact must have, as `vlmbuild inspect` prints it: everything else is refused, an older
            version of the artifact too. `model.artifact_id` is the id of what was loaded.
        allow_hardlinks: Accept files with a second name, through which others may write to them.
        trust: ("code",) allows the target aoti, whose compiled code runs with the caller's rights. The others hold none.

    Returns:
        The model, a `VisionLanguageModel` in evaluation mode, an `OnnxVisionLanguageModel` or a
        `CompiledVisionLanguageModel`, and the processor.

    Raises:
        IntegrityError: A file differs from the manifest, or the artifact is another one than expected.
        TrustError: The artifact holds code, and `trust` does not allow it.
        IncompatibleError: The artifact is of another target, newer than this vlmbuild, or compiled for another machine.
        DeviceError: The device is not available here.
        SourceError: A hub id cannot be downloaded.
        UsageError: The dtype is none that a model computes in.
    """
    if dtype is not None:
        one_of("dtype", dtype_name(dtype), DTYPES)
    check_id(expected_id)

    def open_artifact(reader: ArtifactReader) -> Model:
        model = _open(reader, device, dtype, verify, trust)
        model.artifact_id = reader.manifest.id
        if isinstance(model, VisionLanguageModel):
            # A hub id, not the folder of its cache.
            model.source = str(path) if revision is None or "@" in str(path) else f"{path}@{revision}"
            model.identity = Base.of_manifest(reader.manifest)
        return model

    options = {"expected_id": expected_id, "allow_hardlinks": allow_hardlinks}
    model = read_again_if_replaced(artifact_directory(path, revision), open_artifact, **options)
    return model, model.processor


def _open(reader: ArtifactReader, device: Device, dtype: Any, verify: bool, trust: Collection[str]) -> Model:
    manifest = reader.manifest
    opener = OPENERS.get(manifest.target)
    if opener is None:
        raise IncompatibleError(
            f"{reader.path} has target {manifest.target!r}; this vlmbuild loads {', '.join(map(repr, OPENERS))}. Install "
            "one that knows it, or name its plugin: vlmbuild.use_plugins(NAME), or --plugin NAME."
        )
    check_trust(reader.path, manifest, trust)
    chosen_dtype = _dtype(dtype, manifest, opener)
    chosen_device = opener.device(device)
    with reader.verifying(first=opener.proven_first) if verify else nullcontext():
        model = opener.open(reader, chosen_device, chosen_dtype)
        if manifest.entry(GENERATION_CONFIG) is not None:
            model.generation_config = _generation_config(reader)
    return model


def best_device(target: str) -> str:
    """Return the device that the command line runs a target's artifacts on: "cuda" if there is one, else "cpu"."""
    opener = OPENERS.get(target)
    return "cuda" if opener is not None and opener.on_gpu and torch.cuda.is_available() else "cpu"


def check_trust(path: Path, manifest: Manifest, trust: Collection[str]) -> None:
    """Raise TrustError for an artifact with code that the caller has not allowed, however its files are called."""
    opener = OPENERS.get(manifest.target)
    if (manifest.trust["code"] or (opener is not None and opener.runs_code)) and "code" not in trust:
        raise TrustError(
            f"{path} holds compiled code, which would run with your rights. If you trust those who built it, load it with "
            'trust=("code",), or on the command line with --trust-code.'
        )


def _dtype(dtype: str | torch.dtype | None, manifest: Manifest, opener: Opener) -> torch.dtype:
    """Return the compute dtype: the caller's where the target allows it, else the one of the build."""
    built = str(manifest.recipe.get("dtype"))
    name = built if dtype is None else dtype_name(dtype)
    one_of("dtype", name, DTYPES)
    if name != built and not opener.any_dtype:
        raise UsageError(
            f"An artifact of target {manifest.target} computes in the dtype that it was built with, {built}. Leave dtype out."
        )
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def _generation_config(reader: ArtifactReader) -> GenerationConfig:
    """Read the checkpoint's own ends and defaults of generation."""
    try:
        return GenerationConfig.from_dict(json.loads(reader.read(GENERATION_CONFIG)))
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
        raise IncompatibleError(
            f"{GENERATION_CONFIG} of {reader.path} cannot be used: {error}. Build it again."
        ) from error


def _open_trainable(reader: ArtifactReader, device: torch.device, dtype: torch.dtype) -> VisionLanguageModel:
    model = bind_artifact(reader, dtype)
    model.path = reader.path
    # Trainers load processors and references from it.
    model.name_or_path = model.config._name_or_path = str(reader.path)
    return model.eval().to(device)


def _open_onnx(reader: ArtifactReader, device: torch.device, _: torch.dtype) -> Model:
    from vlmbuild.runtime.onnx.model import open_model

    return open_model(reader, device.type)


def _onnx_device(device: Device) -> torch.device:
    """Return the device of an execution provider, which torch need not have."""
    from vlmbuild.runtime.onnx.session import check_provider

    chosen = named_device(device)
    check_provider(chosen.type)
    return chosen


def _open_compiled(reader: ArtifactReader, _: torch.device, dtype: torch.dtype) -> Model:
    from vlmbuild.runtime.aoti.code import adopt_code
    from vlmbuild.runtime.aoti.model import CompiledVisionLanguageModel

    graphs = bind_artifact(reader, dtype).eval()
    adopt_code(graphs, reader.read, str(reader.path))
    return CompiledVisionLanguageModel(graphs, reader.path)


def _compiled_device(device: Device) -> torch.device:
    chosen = available_device(device)
    if chosen.type != "cpu":
        raise IncompatibleError(
            f"The artifact was compiled for CPUs, and cannot run on {chosen}. Build the trainable target."
        )
    return chosen


def _refuse_gguf(reader: ArtifactReader, _: torch.device, __: torch.dtype) -> Model:
    raise IncompatibleError(
        f"{reader.path} is for llama.cpp, which runs it: start it with the arguments in its llama.cpp.json. To load the model "
        "here, build it with --target trainable."
    )


OPENERS: dict[str, Opener] = {
    "trainable": Opener(_open_trainable, any_dtype=True, on_gpu=True, proven_first=False),
    "onnx": Opener(_open_onnx, device=_onnx_device),
    "aoti": Opener(_open_compiled, device=_compiled_device, runs_code=True),
    "compressed-tensors": Opener(_open_trainable, any_dtype=True, on_gpu=True, proven_first=False),
    "gguf": Opener(_refuse_gguf),
}
"""By the manifest's target. Options are refused first, then files are proven, and a model is returned only after both."""

"""From a source and a recipe to an artifact; the only importer of passes and targets."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from vlmbuild.artifact.checkpoint import CheckpointWeights
from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.output import check_output
from vlmbuild.artifact.reader import verify
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.capture import capture
from vlmbuild.errors import ArtifactError, SourceError, UsageError
from vlmbuild.families import Family, family_of
from vlmbuild.outline import outline
from vlmbuild.passes import AddLora, passes_for
from vlmbuild.pipeline import PassReport, run
from vlmbuild.program import Program, Role
from vlmbuild.recipe import Recipe
from vlmbuild.runtime.adapter import read_adapter, unwrap
from vlmbuild.runtime.loader import load
from vlmbuild.runtime.model import AdapterSpec, VisionLanguageModel
from vlmbuild.source import Source, resolve
from vlmbuild.targets import TARGETS, Request
from vlmbuild.targets.request import Progress

_IGNORED_SOURCE_TENSORS = re.compile(r".*rotary_emb\.inv_freq|.*rotary_pos_emb\.inv_freq")
"""Buffers that old checkpoints store; they follow from the config."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished build.

    Attributes:
        path: The artifact's directory.
        manifest: What it holds; `manifest.id` is its identity.
        reports: What each pass did.
    """

    path: Path
    manifest: Manifest
    reports: tuple[PassReport, ...]


def build(
    source: str | Path,
    output: str | Path,
    recipe: Recipe = Recipe(),
    *,
    overwrite: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Build an artifact.

    Args:
        source: A checkpoint directory, a hub id, or the name of a zoo checkpoint.
        output: The directory to make; appears complete or not at all.
        recipe: What to build.
        overwrite: Replace an artifact that is there.
        revision: Of a hub id.
        progress: Called with a stage's name, the amount done, and the total.

    Raises:
        OutputError: The output exists or cannot be written; found before any work.
        SourceError: The source cannot be used.
        CaptureError, PassError: The graph cannot be built as asked.
    """
    told = progress or (lambda _stage, _done, _total: None)
    check_output(Path(output), overwrite=overwrite)
    found = resolve(source, revision=revision)
    values = found.config()
    family = family_of(values, str(found.directory / "config.json"))
    if "quantization_config" in values:
        raise SourceError(
            f"{found.directory} is quantized already ({values['quantization_config'].get('quant_method')}). Build from "
            "the unquantized checkpoint; quantized sources are not supported yet."
        )
    weights = CheckpointWeights(found.directory)
    config = family.config(values)
    program = trace_program(family, config, told)
    check_weights(program, family, weights)
    reports = run(passes_for(recipe), program, require=recipe.require, on_pass=lambda r: told(f"pass {r.name}", 1, 1))
    request = Request(program, reports, family, values, recipe, found, weights, told)
    with ArtifactWriter(output, overwrite=overwrite) as writer:
        manifest = TARGETS[recipe.target](writer, request)
    return Artifact(Path(output), manifest, reports)


def trace_program(family: Family, config: Any, progress: Progress) -> Program:
    """Capture and outline all variants of a model, from its config alone."""
    traces = {}
    variants = family.variants(config)
    for done, name in enumerate(variants, start=1):
        progress(f"capture {name}", done - 1, len(variants))
        traces[name] = capture(family, config, name)
        progress(f"capture {name}", done, len(variants))
    return outline(family, family.geometry(config), family.ties(config), traces)


def check_weights(program: Program, family: Family, weights: CheckpointWeights) -> None:
    """Hold a checkpoint's tensors against the program, before any is read.

    Raises:
        SourceError: Tensors are missing, left over, or of another shape than the config says; they are named.
    """
    stored = {family.module_name(name): info for name, info in weights.tensors.items()}
    needed = {name: slot for name, slot in program.slots() if slot.kind == "parameter"}
    missing = sorted(set(needed) - set(stored))
    if missing:
        raise SourceError(
            f"{weights.directory} lacks {_listed(missing, family)}, which config.json asks for. The checkpoint is "
            "incomplete, or its config.json belongs to another model."
        )
    for name, slot in needed.items():
        if stored[name].shape != slot.shape:
            raise SourceError(
                f"{weights.directory}: tensor {family.stored_name(name)} has shape {list(stored[name].shape)}, but "
                f"config.json asks for {list(slot.shape)}. The weights and config.json do not belong together."
            )
    extra = sorted(name for name in set(stored) - set(needed) - set(program.ties) if not _IGNORED_SOURCE_TENSORS.fullmatch(name))
    if extra:
        raise SourceError(
            f"{weights.directory} holds {_listed(extra, family)}, which a model with this config.json does not have. "
            "Building would lose them; check num_hidden_layers and depth."
        )


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    **recipe: Any,
) -> tuple[VisionLanguageModel, Any]:
    """Build on first use into a cache, load from then on. Safe when several processes start at once.

    Args:
        source: As for `build`.
        revision: Of a hub id.
        cache_dir: Where builds are kept; $VLMBUILD_CACHE or ~/.cache/vlmbuild by default.
        device: As for `vlmbuild.load`.
        **recipe: Fields of `Recipe`, for example quantize="nf4".

    Raises:
        VlmbuildError: As `build` and `load`.
    """
    chosen = Recipe.from_mapping(recipe, where="from_pretrained")
    found = resolve(source, revision=revision)
    cache = Path(cache_dir or os.environ.get("VLMBUILD_CACHE") or Path.home() / ".cache" / "vlmbuild")
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / _cache_key(found, chosen)
    with FileLock(f"{path}.lock"):
        if not _is_sound(path):
            build(source, path, chosen, overwrite=path.exists(), revision=revision)
    return load(path, device=device, verify=False)


def add_lora(model: nn.Module, r: int = 16, alpha: float | None = None, roles: Collection[Role] = ("language",)) -> None:
    """Freeze the model and add a trainable LoRA adapter to its linear layers, plain or quantized, in place.

    Args:
        model: From `vlmbuild.load`; may be compiled already.
        r: Rank.
        alpha: Scale is alpha / r; None is 2 r.
        roles: Which layers: "language", "vision", "projector", "head".

    Raises:
        UsageError: The rank is not positive, no layer has one of the roles, or the model has an adapter already.
    """
    model = unwrap(model)
    if r < 1:
        raise UsageError(f"r must be at least 1, got {r}.")
    if model.adapter is not None:
        raise UsageError("The model has an adapter already; load the artifact again for another one.")
    spec = AdapterSpec(r, float(2 * r if alpha is None else alpha))
    (report,) = run([AddLora(spec.r, spec.alpha, tuple(roles))], model.program)
    if not report.matches:
        raise UsageError(f"No linear layer has a role among {', '.join(roles)}; nothing to adapt.")
    model.requires_grad_(False)
    model.adopt_adapter(spec, report.sites)


def load_adapter(model: nn.Module, directory: str | Path) -> None:
    """Give a model without an adapter the one that a directory holds in PEFT's format.

    Raises:
        SourceError: It is not a plain LoRA adapter, or it does not fit the model; the tensor is named.
    """
    rank, alpha, tensors = read_adapter(directory)
    model = unwrap(model)
    modules = {name.partition(".lora_")[0] for name in tensors}
    add_lora(model, rank, alpha, roles=model.roles_of(modules))
    adapters = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    for name in sorted(set(tensors) ^ set(adapters)):
        raise SourceError(f"{directory}: {name} is {'not in the model' if name in tensors else 'missing'}.")
    with torch.no_grad():
        for name, parameter in adapters.items():
            if parameter.shape != tensors[name].shape:
                raise SourceError(f"{directory}: {name} has shape {list(tensors[name].shape)}, not {list(parameter.shape)}.")
            parameter.copy_(tensors[name])


def _cache_key(source: Source, recipe: Recipe) -> str:
    """Changes with the source's files (name, size, time), the recipe, and the versions that decide the artifact."""
    stats = [(file.name, file.stat()) for file in sorted(source.directory.iterdir()) if file.is_file()]
    parts = [
        source.uri if "@" in source.uri else str(source.directory.resolve()),
        *(f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in stats),
        recipe.fingerprint(),
        *(importlib.metadata.version(tool) for tool in ("vlmbuild", "torch", "transformers", "bitsandbytes")),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _is_sound(path: Path) -> bool:
    try:
        verify(path)
    except ArtifactError:
        return False
    return True


def _listed(names: list[str], family: Family) -> str:
    shown = ", ".join(family.stored_name(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more tensors" if len(names) > 5 else "")

"""The trainable target: an ordinary Hugging Face checkpoint, quantized in bitsandbytes' layout, with the program beside it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vlmbuild.targets.request import Job, Request

from vlmbuild.artifact import bitsandbytes_format as bitsandbytes
from vlmbuild.artifact.manifest import Manifest, canonical_json
from vlmbuild.artifact.weights import TensorSpec, WeightsWriter
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.families import Family
from vlmbuild.graph_text import program_text
from vlmbuild.program import Program, Region, WeightRecipe, join
from vlmbuild.program_json import to_json
from vlmbuild.recipe import TOOLS, QuantSpec, Recipe
from vlmbuild.source import PROCESSOR_FILES, Progress, Source

_NOT_COPIED = ("auto_map", "trust_remote_code", "_attn_implementation", "attn_implementation", "torch_dtype", "dtype")
_CHUNK_BYTES = 1 << 22


def write(writer: ArtifactWriter, request: Request) -> Manifest:
    """Write and publish a trainable artifact; weights pass through memory one tensor at a time.

    Raises:
        SourceError: A tensor cannot be read or quantized.
        OutputError: There is no space, or the output cannot be written.
    """
    recipe, program = request.recipe, request.program
    jobs = list(stored_tensors(program, request.family, recipe))
    specs = [spec for _, _, stored in jobs for spec in stored]
    writer.require_space(
        sum(spec.nbytes for spec in specs) + sum(f.stat().st_size for f in _side_files(request.source))
    )
    config = _artifact_config(request.config, program, recipe)
    writer.write("config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), "config")
    for file in _side_files(request.source):
        writer.copy(file, file.name, "config" if file.name == "generation_config.json" else "processor")
    writer.write("graph/program.json", canonical_json(to_json(program)), "graph")
    writer.write("graph/program.txt", program_text(program).encode(), "graph")
    _write_weights(writer, request, jobs, specs)
    return writer.publish(
        name="-".join([program.family, recipe.quantize.format if recipe.quantize else recipe.dtype]),
        target="trainable",
        source=[_source_record(request)],
        recipe=recipe.to_mapping(),
        passes=[report.record() for report in request.reports],
        toolchain={tool: importlib.metadata.version(tool).partition("+")[0] for tool in TOOLS},
    )


def stored_tensors(program: Program, family: Family, recipe: Recipe) -> Iterator[Job]:
    """What becomes of every source tensor, each once, in the order of the regions; follows from the program alone."""
    dtype = getattr(torch, recipe.dtype)
    seen = set()
    for region in program.regions.values():
        for instance in region.instances:
            for relative, shape, weight_recipe in _source_tensors(region):
                name = join(instance, relative)
                stored = family.stored_name(name)
                if name in seen:
                    continue
                seen.add(name)
                if weight_recipe is None:
                    yield name, None, (TensorSpec(stored, dtype, shape),)
                else:
                    yield name, weight_recipe, _quantized_specs(stored, dtype, weight_recipe)


def _source_tensors(region: Region) -> Iterator[tuple[str, tuple[int, ...], WeightRecipe | None]]:
    yield from ((recipe.source, recipe.shape, recipe) for recipe in region.recipes)
    yield from ((slot.name, slot.shape, None) for slot in region.slots if slot.kind == "parameter")


def _quantized_specs(stored: str, dtype: torch.dtype, recipe: WeightRecipe) -> tuple[TensorSpec, ...]:
    return bitsandbytes.stored_specs(
        stored,
        recipe.shape,
        dtype,
        quant_type=recipe.format,
        blocksize=recipe.blocksize,
        double_quant=recipe.double_quant,
    )


def _write_weights(writer: ArtifactWriter, request: Request, jobs: list[Job], specs: list[TensorSpec]) -> None:
    dtype = getattr(torch, request.recipe.dtype)
    by_name = {request.family.module_name(stored): stored for stored in request.weights.tensors}
    sizes = {name: request.weights.tensors[by_name[name]].nbytes for name, _, _ in jobs}
    done = 0
    with WeightsWriter(writer, specs) as output:
        for name, weight_recipe, stored in jobs:
            tensor = request.weights.read(by_name[name]).to(dtype)
            done += sizes[name]
            for suffix, part in _stored_parts(tensor, weight_recipe, name).items():
                output.add(stored[0].name + suffix, part)
            request.progress("weights", done, sum(sizes.values()))


def _stored_parts(tensor: Tensor, recipe: WeightRecipe | None, name: str) -> Mapping[str, Tensor]:
    if recipe is None:
        return {"": tensor}
    return bitsandbytes.quantize(
        tensor, quant_type=recipe.format, blocksize=recipe.blocksize, double_quant=recipe.double_quant, name=name
    )


def _artifact_config(values: Mapping[str, Any], program: Program, recipe: Recipe) -> dict[str, Any]:
    """The source's config with our dtype and quantization, and without anything that names code."""
    config = {key: value for key, value in values.items() if key not in _NOT_COPIED}
    for key, part in config.items():
        if isinstance(part, Mapping) and key.endswith("_config"):
            config[key] = {inner: value for inner, value in part.items() if inner not in _NOT_COPIED}
    config["dtype"] = recipe.dtype
    if recipe.quantize is not None:
        config["quantization_config"] = _quantization_config(program, recipe.quantize, recipe.dtype)
    return config


def _quantization_config(program: Program, spec: QuantSpec, dtype: str) -> dict[str, Any]:
    quantized = {
        join(instance, recipe.source).removesuffix(".weight")
        for region in program.regions.values()
        for instance in region.instances
        for recipe in region.recipes
    }
    kept = {
        name.removesuffix(".weight")
        for name, slot in program.slots()
        if slot.kind == "parameter" and len(slot.shape) == 2 and name.endswith(".weight")
    }
    kept |= {alias.removesuffix(".weight") for alias in program.ties}
    return bitsandbytes.quantization_config(
        skip_modules=sorted({_widest_prefix(module, quantized) for module in kept}),
        quant_type=spec.format,
        double_quant=spec.double_quant,
        compute_dtype=dtype,
    )


def _widest_prefix(module: str, quantized: set[str]) -> str:
    """The shortest leading part of a module's path below which nothing is quantized."""
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return next(prefix for prefix in prefixes if not any(f"{name}.".startswith(f"{prefix}.") for name in quantized))


def _side_files(source: Source) -> list[Path]:
    return source.files((*PROCESSOR_FILES, "generation_config.json"))


def _source_record(request: Request) -> dict[str, Any]:
    files = [request.source.directory / "config.json", *_side_files(request.source), *request.weights.files]
    entries = [
        {"path": file.name, "size": file.stat().st_size, "digest": digest}
        for file, digest in zip(files, _digests(files, request.progress), strict=True)
    ]
    return {"uri": request.source.uri, "files": sorted(entries, key=lambda entry: str(entry["path"]))}


def _digests(files: list[Path], progress: Progress) -> Iterator[str]:
    total = sum(file.stat().st_size for file in files)
    done = 0
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                progress("source digests", done, total)
        yield digest.hexdigest()

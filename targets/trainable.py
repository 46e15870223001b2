"""The trainable target: an ordinary Hugging Face checkpoint, quantized in bitsandbytes' layout, with the program beside
it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from vlmbuild.artifact.canonical import canonical_json
from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.paths import GENERATION_CONFIG
from vlmbuild.artifact.weights_writer import TensorSpec
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.families import Family
from vlmbuild.formats import WeightFormat
from vlmbuild.ir.printer import program_text
from vlmbuild.ir.program import Program, join
from vlmbuild.ir.serialize import PROGRAM_FILE, to_json
from vlmbuild.quant.bnb_config import is_skipped, quantization_config
from vlmbuild.recipe import Recipe
from vlmbuild.targets.golden import record_golden
from vlmbuild.targets.records import artifact_config, publish
from vlmbuild.targets.request import Request, StoredParameter
from vlmbuild.targets.weights import stored_specs, write_weights


def write(writer: ArtifactWriter, request: Request) -> Manifest:
    """Write and publish a trainable artifact; weights pass through memory in chunks.

    Raises:
        SourceError: A tensor cannot be read or quantized.
        ParityError: The merged weights differ from source plus adapter.
        OutputError: There is no space, or the output cannot be written.
    """
    write_checkpoint(writer, request)
    numerics = [*request.measure(writer.staging), *record_golden(writer, request)]
    return publish(writer, request, formats=format_names(request.program), numerics=numerics)


def write_checkpoint(
    writer: ArtifactWriter, request: Request, quantization: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Write all files of a trainable artifact, or of a checkpoint with another `quantization_config` in config.json.

    Returns:
        The relative error of each parameter that is rounded here, if there is another `quantization_config`.

    Raises:
        SourceError: A tensor cannot be read or quantized.
        OutputError: There is no space, or the output cannot be written.
    """
    program = request.program
    parameters = list(stored_parameters(program, request.family, request.recipe))
    side_files = request.side_files()
    specs = [spec for group in stored_specs(request, parameters) for spec in group]
    writer.require_space(sum(spec.nbytes for spec in specs) + sum(map(len, side_files.values())))
    config = artifact_config(request.checkpoint.values, request.recipe)
    announced = _quantization(program, request.family, request.recipe) if quantization is None else quantization
    if announced:
        config["quantization_config"] = announced
    writer.write("config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), "config")
    for name, data in side_files.items():
        writer.write(name, data, "config" if name == GENERATION_CONFIG else "processor")
    writer.write(PROGRAM_FILE, canonical_json(to_json(program)), "graph")
    writer.write("graph/program.txt", program_text(program).encode(), "graph")
    return write_weights(writer, request, parameters, losses=quantization is not None)


def stored_parameters(program: Program, family: Family, recipe: Recipe) -> Iterator[StoredParameter]:
    """Yield every source parameter as it is stored, once, in the order of the regions."""
    dtype = getattr(torch, recipe.dtype)
    for name, shape, form in program.source_weights():
        yield StoredParameter(name, shape, form, _specs(family.stored_name(name), shape, dtype, form))


def _specs(
    stored: str, shape: tuple[int, ...], dtype: torch.dtype, form: WeightFormat | None
) -> tuple[TensorSpec, ...]:
    if form is None:
        return (TensorSpec(stored, dtype, shape),)
    return form.parts(stored.removesuffix(".weight"), shape, dtype)


def format_names(program: Program) -> list[str]:
    """List names of the weights' formats, most frequent first."""
    return [form.name for form in _formats(program)]


def _formats(program: Program) -> list[WeightFormat]:
    """List formats of the weights, most frequent first."""
    counts = Counter(
        recipe.format for region in program.regions.values() for recipe in region.recipes for _ in region.instances
    )
    return [form for form, _ in counts.most_common()]


def _quantization(program: Program, family: Family, recipe: Recipe) -> Mapping[str, Any]:
    """Return the `quantization_config` of bitsandbytes' formats; {} where nothing is quantized."""
    formats = _formats(program)
    if not formats:
        return {}
    return quantization_config(formats, skip_modules=_kept_modules(program, family), compute_dtype=recipe.dtype)


def _kept_modules(program: Program, family: Family) -> list[str]:
    """Return the shortest module names that cover all unquantized matrices and no quantized one.

    Each is there by all of the family's names: clients look modules up by names of their own time.
    """
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
    widest = {_widest_prefix(module, quantized) for module in kept}
    names = {name for module in widest for name in family.client_names(module)}
    # transformers takes the end of a name for the name.
    return sorted(widest | {name for name in names if not any(is_skipped(module, [name]) for module in quantized)})


def _widest_prefix(module: str, quantized: set[str]) -> str:
    """Return the shortest leading part of a module's path below which nothing is quantized."""
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return next(prefix for prefix in prefixes if not any(f"{name}.".startswith(f"{prefix}.") for name in quantized))

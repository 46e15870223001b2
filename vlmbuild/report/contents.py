"""Contents of an artifact as plain values. Manifest, program and headers are read as data, without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmbuild.artifact.canonical import parse_canonical
from vlmbuild.artifact.reader import ArtifactReader, read_again_if_replaced
from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.builder.summary import WeightSummary, describe_roles, refusals_by_role
from vlmbuild.errors import IncompatibleError
from vlmbuild.formats import WeightFormat, format_from_json
from vlmbuild.ir.schema import PROGRAM_FILE, SCHEMA, TENSORS_FILE, Role
from vlmbuild.runtime.onnx.sizes import stored_sizes
from vlmbuild.util.renamed import PASSES

_PARTS = re.compile(r"\.weight\..*|\.weight_(packed|scale|shape)$|\.(SCB|weight_format)$")
"""Ends of the names of a quantized weight's further tensors."""


def contents(path: str | Path) -> dict[str, Any]:
    """Describe an artifact; only files that are read for it are verified.

    Raises:
        IntegrityError: It is no artifact, or its manifest or program was changed.
        IncompatibleError: This version does not know its format.
    """
    return read_again_if_replaced(path, _contents)


def _contents(reader: ArtifactReader) -> dict[str, Any]:
    manifest = reader.manifest
    program = _program(reader)
    passes = [{**record, "name": PASSES.get(record["name"], record["name"])} for record in manifest.passes]
    try:
        weights = list(_weights(program, _sizes(reader, program), manifest.target))
        regions = [
            _region(entry, [weight for region, weight in weights if region == entry["name"]])
            for entry in program["regions"]
        ]
        roles = {(entry["name"], slot["name"]): slot["role"] for entry in program["regions"] for slot in entry["slots"]}
        variants, ties = list(program["variants"]), dict(program["ties"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise IncompatibleError(
            f"The stored program is malformed: {type(error).__name__} {error}. Build the artifact again."
        ) from error
    return {
        "path": str(reader.path),
        "id": manifest.id,
        "name": manifest.name,
        "target": manifest.target,
        "bytes": manifest.total_bytes,
        "recipe": dict(manifest.recipe),
        "source": [dict(entry) for entry in manifest.source],
        "toolchain": dict(manifest.toolchain),
        "trust": manifest.trust,
        "files": [{"path": entry.path, "role": entry.role, "bytes": entry.size} for entry in manifest.files],
        "variants": variants,
        "regions": regions,
        "passes": passes,
        "numerics": [dict(record) for record in manifest.numerics],
        "roles": describe_roles([weight for _, weight in weights], refusals_by_role(roles, passes)),
        "ties": ties,
    }


def _program(reader: ArtifactReader) -> Mapping[str, Any]:
    program = parse_canonical(reader.read(PROGRAM_FILE), where=PROGRAM_FILE)
    schema = program.get("schema") if isinstance(program, Mapping) else type(program).__name__
    if schema != SCHEMA or not isinstance(program, Mapping):
        raise IncompatibleError(
            f"The program has schema {schema!r}; this vlmbuild reads {SCHEMA!r}. Build the artifact again."
        )
    return program


def _region(entry: Mapping[str, Any], weights: Sequence[WeightSummary]) -> dict[str, Any]:
    """Describe a region: parameters of one instance, and what is stored for all; a shared weight counts in the first."""
    return {
        "name": entry["name"],
        "instances": len(entry["instances"]),
        "operators": len(entry["nodes"]),
        "parameters": sum(math.prod(shape) for _, shape, _, _ in _weights_of(entry)),
        "stored_parameters": sum(weight.parameters for weight in weights),
        "bytes": sum(weight.nbytes for weight in weights),
    }


def _weights_of(entry: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], Role, WeightFormat | None]]:
    """Yield (relative name, shape in the source, role, format) of a region's weights."""
    roles = {slot["name"]: slot["role"] for slot in entry["slots"]}
    quantized = {recipe["source"] for recipe in entry["recipes"]}
    for recipe in entry["recipes"]:
        form = format_from_json(recipe["format"])
        yield recipe["source"], tuple(recipe["shape"]), roles[recipe["source"]], form
    for slot in entry["slots"]:
        if slot["kind"] == "parameter" and slot["name"] not in quantized:
            yield slot["name"], tuple(slot["shape"]), slot["role"], None


def _weights(
    program: Mapping[str, Any], sizes: Mapping[str, int], target: str = "trainable"
) -> Iterator[tuple[str, WeightSummary]]:
    """Yield (region, weight) for every weight of the program once."""
    seen = set()
    for entry in program["regions"]:
        for instance in entry["instances"]:
            for relative, shape, role, form in _weights_of(entry):
                name = f"{instance}.{relative}" if instance else relative
                if name not in seen:
                    seen.add(name)
                    described = None if form is None else form.describe(target)
                    yield entry["name"], WeightSummary(name, role, math.prod(shape), sizes.get(name, 0), described)


def _sizes(reader: ArtifactReader, program: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of each weight, by module name."""
    if reader.manifest.target == "onnx":
        return stored_sizes(reader.path / "onnx")
    if reader.manifest.entry(TENSORS_FILE) is not None:
        places = parse_canonical(reader.read(TENSORS_FILE), where=TENSORS_FILE)
        return {name: sum(nbytes for _, _, nbytes in tensors) for name, tensors in places.items()}
    stored: dict[str, int] = {}
    for name, info in CheckpointWeights(reader.path).tensors.items():
        owner = _PARTS.sub(".weight", name)
        stored[owner] = stored.get(owner, 0) + info.nbytes
    names = [weight.name for _, weight in _weights(program, {})]
    return {module: stored[published] for module, published in published_names(names, stored).items()}


def published_names(modules: Iterable[str], published: Iterable[str]) -> dict[str, str]:
    """Match names of modules with published names, which differ in leading parts only: the longest common end counts.

    Raises:
        IncompatibleError: A weight is not published under any name.
    """
    names: dict[str, str] = {}
    left, unmatched = set(published), list(modules)
    for dropped in range(
        3
    ):  # "model.language_model.norm.weight" is "language_model.model.norm.weight" or "model.norm.weight"
        ends: dict[str, list[str]] = {}
        for name in left:
            for part in range(3):
                ends.setdefault(".".join(name.split(".")[part:]), []).append(name)
        for module in unmatched:
            found = ends.get(".".join(module.split(".")[dropped:]), [])
            if len(found) == 1:
                names[module] = found[0]
        left, unmatched = left - set(names.values()), [module for module in unmatched if module not in names]
    if unmatched:
        raise IncompatibleError(f"The weights lack {unmatched[0]}, which the program needs. Build the artifact again.")
    return names

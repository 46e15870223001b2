"""What a model consists of, for people and machines: regions, and parameters and bytes by role."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.families import Family, family_named
from vlmbuild.formats import WeightFormat
from vlmbuild.ir.program import Program, Region, Role, join
from vlmbuild.quant.decide import QUANTIZE
from vlmbuild.runtime.load import read_program
from vlmbuild.runtime.onnx.weights import OnnxWeights


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A source tensor in an artifact: its module name, what it does, the bytes that it takes as it is stored, and how."""

    name: str
    role: Role
    parameters: int
    nbytes: int
    format: WeightFormat | None


def describe_regions(program: Program) -> list[dict[str, Any]]:
    """Every region with its instances, operators and parameters of one instance."""
    return [
        {
            "name": region.name,
            "instances": len(region.instances),
            "operators": sum(node.op == "call_function" for node in region.graph.graph.nodes),
            "parameters": sum(math.prod(shape) for _, shape, _ in _weights_of(region)),
        }
        for region in program.regions.values()
    ]


def describe_roles(weights: Iterable[StoredWeight], refusals: dict[Role, list[str]]) -> list[dict[str, Any]]:
    """Parameters and bytes of every role, how many of its parameters are in which format, and why others are not."""
    weights = list(weights)
    described = []
    for role in get_args(Role):
        mine = [weight for weight in weights if weight.role == role]
        if mine:
            parameters = sum(weight.parameters for weight in mine)
            formats: Counter[str] = Counter()
            for weight in mine:
                if weight.format is not None:
                    formats[weight.format.describe()] += weight.parameters
            quantized = sum(formats.values())
            reasons = list(dict.fromkeys(refusals.get(role, []))) + (["norms and biases"] if quantized else [])
            described.append(
                {
                    "role": role,
                    "parameters": parameters,
                    "quantized": quantized,
                    "formats": dict(formats.most_common()),
                    "bytes": sum(weight.nbytes for weight in mine),
                    "kept": reasons if quantized < parameters else [],
                }
            )
    return described


def refusals_by_role(program: Program, passes: Iterable[dict[str, Any]]) -> dict[Role, list[str]]:
    """Why linear layers were not quantized, from the records of the passes."""
    roles = {(region.name, slot.name): slot.role for region in program.regions.values() for slot in region.slots}
    found: dict[Role, list[str]] = {}
    for record in passes:
        for refusal in record["refusals"] if record["name"] == QUANTIZE else ():
            region, _, rest = refusal.partition(": ")
            module, _, reason = rest.partition(": ")
            role = roles.get((region, f"{module}.weight"))
            if role is not None:
                found.setdefault(role, []).append(reason)
    return found


def inspect(path: str | Path) -> dict[str, Any]:
    """What an artifact says of itself; only the files that are read for it are verified.

    Raises:
        IntegrityError: It is no artifact, or its manifest or program is not what was written.
        IncompatibleError: This vlmbuild does not know its format.
    """
    reader = ArtifactReader(path, verify=False)
    manifest = reader.manifest
    program = read_program(reader)
    family = family_named(program.family)
    passes = [dict(record) for record in manifest.passes]
    if manifest.target == "onnx":
        sizes = OnnxWeights(reader.path).sizes()
    else:
        sizes = _checkpoint_sizes(CheckpointWeights(reader.path), family)
    weights = _stored_weights(program, family, sizes)
    return {
        "path": str(path),
        "id": manifest.id,
        "name": manifest.name,
        "target": manifest.target,
        "bytes": manifest.total_bytes,
        "recipe": dict(manifest.recipe),
        "source": [dict(entry) for entry in manifest.source],
        "toolchain": dict(manifest.toolchain),
        "trust": manifest.trust,
        "files": [{"path": entry.path, "role": entry.role, "bytes": entry.size} for entry in manifest.files],
        "variants": list(program.variants),
        "regions": describe_regions(program),
        "passes": passes,
        "numerics": [dict(record) for record in manifest.numerics],
        "roles": describe_roles(weights, refusals_by_role(program, passes)),
        "ties": program.ties,
    }


def _checkpoint_sizes(checkpoint: CheckpointWeights, family: Family) -> dict[str, int]:
    """Module name -> bytes that a weight takes in a checkpoint; a quantized one has several tensors."""
    sizes: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        owner, separator, _ = name.partition(".weight.")
        if not separator:
            owner, separator, _ = re.sub(r"\.(SCB|weight_format)$", ".weight.", name).partition(".weight.")
        owner = family.module_name(owner + (".weight" if separator else ""))
        sizes[owner] = sizes.get(owner, 0) + info.nbytes
    return sizes


def _stored_weights(program: Program, family: Family, sizes: Mapping[str, int]) -> Iterable[StoredWeight]:
    """A program's weights with the bytes that they take."""
    seen = set()
    for region in program.regions.values():
        for instance in region.instances:
            for relative, shape, form in _weights_of(region):
                name = join(instance, relative)
                if name not in seen:
                    seen.add(name)
                    yield StoredWeight(name, family.role(name), math.prod(shape), sizes.get(name, 0), form)


def _weights_of(region: Region) -> Iterable[tuple[str, tuple[int, ...], WeightFormat | None]]:
    """(relative name, source shape, format) of a region's weights."""
    quantized = {recipe.source for recipe in region.recipes}
    yield from ((recipe.source, recipe.shape, recipe.format) for recipe in region.recipes)
    kept = (slot for slot in region.slots if slot.kind == "parameter" and slot.name not in quantized)
    yield from ((slot.name, slot.shape, None) for slot in kept)

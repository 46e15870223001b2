"""Write an artifact of the AOTInductor target: the trainable layout, then code, held against the graphs before it is
published."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmbuild.targets.aoti.workers import compile_units
from vlmbuild.targets.request import Request
from vlmbuild.targets.trainable import publish, write_checkpoint

from vlmbuild.artifact.manifest import Manifest, canonical_json
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.code_index import CODE_INDEX, FORMS, CodeEntry, CodeIndex, compiled_regions
from vlmbuild.graph_text import digest
from vlmbuild.kv_cache import with_cache
from vlmbuild.program import Program, Region
from vlmbuild.program_json import from_json, to_json
from vlmbuild.runtime.code_numerics import measure_code_apart

_CODE_BYTES = 4 << 20
"""More than a region's package takes."""


def write(writer: ArtifactWriter, request: Request) -> Manifest:
    """Write and publish an artifact with code for processors like this one.

    Raises:
        SourceError: A tensor cannot be read or quantized.
        CompileError: A region cannot be compiled.
        ParityError: The code computes something else than the graphs, or merged weights are wrong.
        OutputError: There is no space, or the output cannot be written.
    """
    write_checkpoint(writer, request)
    merged = request.measure(writer.staging)
    _write_code(writer, request)
    numerics = measure_code_apart(writer.staging, request.recipe.dtype, request.progress)
    return publish(writer, request, [*merged, *numerics])


def _write_code(writer: ArtifactWriter, request: Request) -> None:
    from vlmbuild.targets.aoti.compile import code_platform  # inductor, which no other command needs

    stored = from_json(to_json(request.program))  # as it will be read: digests are of graphs without captured shapes
    programs = {form: with_cache(stored, form) for form in FORMS}
    distinct = _distinct(programs)
    units = {f"{form}:{name}": len(region.graph.graph.nodes) for form, name, region in distinct.values()}
    platform = code_platform()
    writer.require_space(_CODE_BYTES * len(units))
    with tempfile.TemporaryDirectory() as scratch:
        compiled = compile_units(
            writer.staging / "graph/program.json", request.recipe.dtype, Path(scratch), units,
            lambda done, total: request.progress("compile", done, total),
        )  # fmt: skip
        entries: dict[str, CodeEntry] = {}
        for graph, (form, name, _) in distinct.items():
            made = compiled[f"{form}:{name}"]
            file = f"code/{platform.folder}/{form}/{name}.pt2"
            writer.copy(made["file"], file, "code")
            entries[graph] = CodeEntry(file, tuple((place, dtype) for place, dtype in made["inputs"]), graph)
    regions: dict[str, Mapping[str, CodeEntry]] = {
        form: {name: entries[digest(region)] for name, region in compiled_regions(program).items()}
        for form, program in programs.items()
    }
    index = CodeIndex(platform, request.recipe.dtype, regions)
    writer.write(CODE_INDEX, canonical_json(index.record()), "data")


def _distinct(programs: Mapping[Any, Program]) -> dict[str, tuple[str, str, Region]]:
    """Digest -> form, name and region of every graph to compile, each once."""
    found: dict[str, tuple[str, str, Region]] = {}
    for form, program in programs.items():
        for name, region in compiled_regions(program).items():
            found.setdefault(digest(region), (form, name, region))
    return found

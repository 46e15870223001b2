"""Write an artifact of the AOTInductor target: the trainable layout, then code, held against the graphs before it is
published."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmbuild.targets.aoti.units import Unit, distinct_units, token_axis
from vlmbuild.targets.aoti.workers import compile_units
from vlmbuild.targets.request import Request
from vlmbuild.targets.trainable import publish, write_checkpoint

from vlmbuild.artifact.manifest import Manifest, canonical_json
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.cached_block import CacheForm
from vlmbuild.code_index import CODE_INDEX, FORMS, CodeEntry, CodeFile, CodeIndex, compiled_regions
from vlmbuild.code_platform import CodePlatform
from vlmbuild.graph_text import digest
from vlmbuild.kv_cache import with_cache
from vlmbuild.program import Program
from vlmbuild.program_json import from_json, to_json
from vlmbuild.runtime.code_numerics import measure_code_apart
from vlmbuild.shapes import annotate_shapes

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
    graphs = {
        form: {name: digest(region) for name, region in compiled_regions(program).items()}
        for form, program in programs.items()
    }
    units = distinct_units(graphs)
    for program in programs.values():
        annotate_shapes(program)
    axes = {graph: _token_axis(programs, unit) for graph, unit in units.items()}
    platform = code_platform()
    files = _compile(
        writer, request, programs, platform, [*units.values(), *(units[g].of_token() for g in axes if axes[g])]
    )
    entries = {
        graph: CodeEntry(graph, files[unit], files.get(unit.of_token()), axes[graph]) for graph, unit in units.items()
    }
    regions: dict[str, Mapping[str, CodeEntry]] = {
        form: {name: entries[graph] for name, graph in named.items()} for form, named in graphs.items()
    }
    writer.write(CODE_INDEX, canonical_json(CodeIndex(platform, request.recipe.dtype, regions).record()), "data")


def _token_axis(programs: Mapping[CacheForm, Program], unit: Unit) -> tuple[int, int] | None:
    return token_axis(programs[unit.form].regions[unit.region], unit.form)


def _compile(
    writer: ArtifactWriter, request: Request, programs: Mapping[CacheForm, Program], platform: CodePlatform,
    units: Sequence[Unit],
) -> dict[Unit, CodeFile]:  # fmt: skip
    """Compile units, and write their packages."""
    writer.require_space(_CODE_BYTES * len(units))
    sizes = {str(unit): len(programs[unit.form].regions[unit.region].graph.graph.nodes) for unit in units}
    found: dict[Unit, CodeFile] = {}
    with tempfile.TemporaryDirectory() as scratch:
        compiled = compile_units(
            writer.staging / "graph/program.json", request.recipe.dtype, Path(scratch), sizes,
            lambda done, total: request.progress("compile", done, total),
        )  # fmt: skip
        for unit in units:
            made, file = compiled[str(unit)], f"code/{platform.folder}/{unit.file}"
            writer.copy(made["file"], file, "code")
            found[unit] = CodeFile(file, tuple((place, dtype) for place, dtype in made["inputs"]))
    return found

"""Write an artifact of the AOTInductor target: the trainable layout, then code, checked against the graphs before it is
published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from vlmbuild.artifact.manifest import Manifest, canonical_json
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.measure.aoti_parity import code_measurement
from vlmbuild.runtime.aoti.code_index import CODE_INDEX, CodeFile
from vlmbuild.targets.aoti.compilation import Compilation
from vlmbuild.targets.aoti.plan import CodePlan
from vlmbuild.targets.aoti.units import Unit
from vlmbuild.targets.records import publish
from vlmbuild.targets.request import Request
from vlmbuild.targets.trainable import format_names, write_checkpoint

_CODE_BYTES = 4 << 20
"""More than a region's package takes."""


@contextmanager
def writing() -> Iterator[Callable[[ArtifactWriter, Request], Manifest]]:
    """Return the function that writes and publishes an artifact with code for processors like this one.

    The compiler starts at once and compiles while weights are written and the reference program is prepared.

    Raises, when called:
        SourceError: A tensor cannot be read or quantized.
        CompileError: A region cannot be compiled.
        ParityError: The code computes something else than the graphs, or merged weights are wrong.
        OutputError: There is no space, or the output cannot be written.
    """
    with Compilation() as compilation:
        yield partial(_write, compilation)


def _write(compilation: Compilation, writer: ArtifactWriter, request: Request) -> Manifest:
    compilation.begin(request.program, request.recipe.dtype)
    write_checkpoint(writer, request)
    merged = request.measure(writer.staging)
    with code_measurement(writer.staging, request.recipe.dtype) as measurement:
        plan = _write_code(writer, request, compilation)
        numerics = measurement.records(request.progress)
    return publish(
        writer,
        request,
        formats=format_names(request.program),
        numerics=[*merged, *numerics],
        toolchain={"c++ compiler": plan.compiler},
    )


def _write_code(writer: ArtifactWriter, request: Request, compilation: Compilation) -> CodePlan:
    """Wait for packages, and write them with their index; returns the compiled units' record."""
    plan, packages = compilation.packages(lambda done, total: request.progress("compile", done, total))
    writer.require_space(_CODE_BYTES * len(packages))
    files: dict[Unit, CodeFile] = {}
    for unit, package in sorted(packages.items(), key=lambda item: item[0].file):
        name = f"code/{plan.platform.folder}/{unit.file}"
        writer.copy(package["file"], name, "code")
        files[unit] = CodeFile(name, tuple((index, dtype) for index, dtype in package["inputs"]))
    writer.write(CODE_INDEX, canonical_json(plan.index(request.recipe.dtype, files).record()), "data")
    return plan

"""Write an artifact of the AOTInductor target: the trainable layout, then code, checked against the graphs before it is
published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from vlmbuild.artifact.canonical import canonical_json
from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.measure.aoti_parity import code_measurement
from vlmbuild.runtime.aoti.code_index import CODE_INDEX
from vlmbuild.targets.aoti.compilation import Compilation
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
    with Compilation.begun() as compilation:
        yield partial(_write, compilation)


def _write(compilation: Compilation, writer: ArtifactWriter, request: Request) -> Manifest:
    compilation.compile(request.program, request.recipe.dtype)
    write_checkpoint(writer, request)
    merged = request.measure(writer.staging)
    with code_measurement(writer.staging, request.recipe.dtype) as measurement:
        code = compilation.result(lambda done, total: request.progress("compile", done, total))
        writer.require_space(_CODE_BYTES * len(code.files))
        for name, package in sorted(code.files.items()):
            writer.copy(package, name, "code")
        writer.write(CODE_INDEX, canonical_json(code.index), "data")
        numerics = measurement.records(request.progress)
    return publish(
        writer,
        request,
        formats=format_names(request.program),
        numerics=[*merged, *numerics],
        toolchain={"c++ compiler": code.compiler},
    )

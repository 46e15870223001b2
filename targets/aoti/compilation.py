"""The compilation of an artifact's regions, in a process beside this one: begun early, waited for late."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmbuild.errors import CompileError
from vlmbuild.ir.program import Program
from vlmbuild.ir.serialize import to_json
from vlmbuild.util.child import ChildProcess
from vlmbuild.util.cpu import available_cores

SETTINGS = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class CompiledCode:
    """The result of a compilation.

    Attributes:
        files: Path in the artifact -> the package, until the compilation ends.
        index: The record of the artifact's `CodeIndex`.
        compiler: Name and version of the C++ compiler; other ones make other bytes.
    """

    files: Mapping[str, Path]
    index: Mapping[str, Any]
    compiler: str


@dataclass(frozen=True, slots=True)
class Compilation:
    """A process that is ready to compile, and the folder of its packages."""

    folder: Path
    process: ChildProcess

    @classmethod
    @contextmanager
    def begun(cls) -> Iterator[Compilation]:
        """Start the process; afterwards neither it nor a package is left."""
        with tempfile.TemporaryDirectory() as folder, inductor_cache() as cache:
            arguments = (folder, str(available_cores()))
            with ChildProcess("vlmbuild.targets.aoti.worker", *arguments, settings=SETTINGS | cache) as process:
                yield cls(Path(folder), process)

    def compile(self, program: Program, dtype: str) -> None:
        """Compile a program's regions in the compute dtype of this name."""
        self.process.ask(json.dumps({"program": to_json(program), "dtype": dtype}))

    def result(self, progress: Callable[[int, int], None]) -> CompiledCode:
        """Wait for all packages.

        Args:
            progress: Called with the number of compiled units, and of all.

        Raises:
            CompileError: A region cannot be compiled, for example for want of a C++ compiler.
        """
        for record in map(json.loads, self.process.answers()):
            if "error" in record:
                raise CompileError(_message(record["region"], record["error"]))
            if "index" in record:  # what the process does to end need not be waited for
                files = {name: self.folder / name for name in record["files"]}
                return CompiledCode(files, record["index"], record["compiler"])
            progress(record["done"], record["total"])
        raise CompileError(_message("The program", self._reason()))

    def _reason(self) -> str:
        """Return the reason for which the process ended too early."""
        code, said = self.process.last_words()
        errors = [line.strip() for line in said if "Error" in line]
        if errors or (code > 0 and said):
            return errors[-1] if errors else said[-1].strip()
        return f"the compiling process ended with {code}"


@contextmanager
def inductor_cache() -> Iterator[dict[str, str]]:
    """Yield the settings of inductor's cache: a path with a space gets a link without one, since inductor writes paths into
    command lines as they are."""
    cache = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir()) / "torchinductor")
    if shlex.quote(str(cache)) == str(cache):
        yield {}
        return
    with ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            link = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")), "cache")
            link.symlink_to(cache.absolute(), target_is_directory=True)
        except OSError as error:
            raise CompileError(
                f"Compilers cannot work in {cache}, whose path has a space or a quote, and a link in /tmp cannot be made: "
                f"{error}. Set TORCHINDUCTOR_CACHE_DIR to a folder without these."
            ) from error
        yield {"TORCHINDUCTOR_CACHE_DIR": str(link)}


def _message(what: str, reason: str) -> str:
    return (
        f"{what} cannot be compiled: {reason.rstrip('.')}. AOTInductor needs a C++ compiler (g++ or clang++) on the PATH and "
        "some gigabytes of memory; without these, build the trainable target."
    )

"""The compilation of an artifact's regions, in a process beside this one: begun early, waited for late."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from vlmbuild.errors import CompileError
from vlmbuild.ir.program import Program
from vlmbuild.ir.serialize import to_json
from vlmbuild.targets.aoti.plan import CodePlan
from vlmbuild.targets.aoti.units import Unit
from vlmbuild.util.cpu import available_cores

_SETTINGS = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


class Compilation:
    """A context with a process that gets ready to compile; afterwards no process and no package is left."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stderr = stack.enter_context(self._log.open("w", encoding="utf-8"))
            self._process = subprocess.Popen(  # noqa: S603  (our own interpreter)
                [sys.executable, "-m", "vlmbuild.targets.aoti.worker", str(self._folder), str(available_cores())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **_SETTINGS},
                start_new_session=True,
            )
            stack.callback(self._end)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self, program: Program, dtype: str) -> None:
        """Compile a program's regions in the compute dtype of this name."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:  # why it ended, `packages` says
            json.dump({"program": to_json(program), "dtype": dtype}, stdin)

    def packages(self, progress: Callable[[int, int], None]) -> tuple[CodePlan, dict[Unit, dict[str, Any]]]:
        """Wait for all packages.

        Args:
            progress: Called with the number of compiled units, and of all.

        Returns:
            The plan; and for each unit the package's "file" and its "inputs": indices among the region's activations, in
            the order in which the code takes them, with their dtypes.

        Raises:
            CompileError: A region cannot be compiled, for example for want of a C++ compiler.
        """
        records = self._records()
        first = next(records, None)
        if first is None:
            raise CompileError(_message("The program", self._last_words()))
        plan = CodePlan.from_record(first["plan"])
        found: dict[Unit, dict[str, Any]] = {}
        progress(0, len(plan.weights))
        for record in records:
            unit = Unit.parse(record["unit"])
            if "error" in record:
                raise CompileError(_message(unit.region, record["error"]))
            found[unit] = record
            progress(len(found), len(plan.weights))
            if len(found) == len(plan.weights):  # what the process does to end need not be waited for
                break
        if missing := plan.weights.keys() - found.keys():
            raise CompileError(_message(min(missing, key=str).region, self._last_words()))
        return plan, found

    def _records(self) -> Iterator[dict[str, Any]]:
        """Yield the records that the process prints, until it ends."""
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            yield from map(json.loads, lines)

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    def _last_words(self) -> str:
        """Return the reason for which the process ended too early."""
        code = self._process.wait()
        log = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line.strip() for line in log if "Error" in line]
        if errors or (code > 0 and log):
            return errors[-1] if errors else log[-1].strip()
        return f"the compiling process ended with {code}"

    def _end(self) -> None:
        """End the process, with the compilers that it started."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _message(what: str, reason: str) -> str:
    return (
        f"{what} cannot be compiled: {reason.rstrip('.')}. AOTInductor needs a C++ compiler (g++ or clang++) on the PATH and "
        "some gigabytes of memory; without these, build the trainable target."
    )

"""Several processes that compile regions; the caller waits, and what it leaves early it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from vlmbuild.cores import available_cores
from vlmbuild.errors import CompileError

_SETTINGS = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def compile_units(
    program_file: Path, dtype: str, folder: Path, weights: Mapping[str, int], progress: Callable[[int, int], None]
) -> dict[str, dict[str, Any]]:
    """Compile "FORM:REGION" units of a program, the heaviest first.

    Args:
        program_file: Its JSON.
        dtype: Name of the compute dtype.
        folder: For the packages.
        weights: Unit -> how much there is to compile, in any measure.
        progress: Told how many are done, of how many.

    Returns:
        Unit -> "file", "inputs" and "graph", as `compile` prints them.

    Raises:
        CompileError: A region cannot be compiled, for example for want of a C++ compiler.
    """
    found: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()

    def collect(worker: _Worker) -> None:
        for record in worker.records():
            with lock:
                found[record["unit"]] = record
                progress(len(found), len(weights))
        missing = [unit for unit in worker.units if unit not in found]
        if missing:
            raise CompileError(_reason(worker, missing[0]))

    progress(0, len(weights))
    shares = _shares(weights, min(available_cores(), len(weights)))
    command = [sys.executable, "-m", "vlmbuild.targets.aoti.compile", str(program_file), dtype, str(folder)]
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(max(1, len(shares))))
        workers = [stack.enter_context(_Worker(command, units, folder / f"{n}.log")) for n, units in enumerate(shares)]
        for job in as_completed([pool.submit(collect, worker) for worker in workers]):
            job.result()
    return found


class _Worker:
    """One process; when it is left, it ends, with the compilers that it started.

    Args:
        command: Without the units.
        units: To compile.
        log: For what it writes to stderr.
    """

    def __init__(self, command: list[str], units: list[str], log: Path) -> None:
        self.units = units
        self.log = log
        with log.open("w", encoding="utf-8") as stderr:
            self._process = subprocess.Popen(  # noqa: S603  (our own interpreter)
                [*command, *units], stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, **_SETTINGS},
                start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def records(self) -> Iterator[dict[str, Any]]:
        """What it says of units, until it ends; compilers print to stdout too."""
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if isinstance(record, dict) and "unit" in record:
                        yield record

    def exit_code(self) -> int:
        """Once there are no more records."""
        return self._process.wait()


def _shares(weights: Mapping[str, int], count: int) -> list[list[str]]:
    """The units divided so that all have about as much to do."""
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for unit in sorted(weights, key=lambda unit: -weights[unit]):
        least = loads.index(min(loads))
        shares[least].append(unit)
        loads[least] += weights[unit]
    return shares


def _reason(worker: _Worker, unit: str) -> str:
    log = worker.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    lines = [line.strip() for line in log if "Error" in line]
    said = lines[-1] if lines else f"the compiling process ended with {worker.exit_code()}"
    return (
        f"{unit.partition(':')[2]} cannot be compiled: {said.rstrip('.')}. AOTInductor needs a C++ compiler (g++ or clang++) "
        "on the PATH and some gigabytes of memory; without these, build the trainable target."
    )

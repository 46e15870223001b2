"""Several processes that compile regions; the caller waits, and what it leaves early it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from vlmbuild.cores import available_cores
from vlmbuild.errors import CompileError

_SETTINGS = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def compile_units(
    program_file: Path,
    dtype: str,
    device: str,
    folder: Path,
    weights: Mapping[str, int],
    progress: Callable[[int, int], None],
) -> dict[str, dict[str, Any]]:
    """Compile "FORM:REGION" units of a program, the heaviest first.

    Args:
        program_file: Its JSON.
        dtype: Name of the compute dtype.
        device: That the code is for.
        folder: For the packages.
        weights: Unit -> how much there is to compile, in any measure.
        progress: Told how many are done, of how many.

    Returns:
        Unit -> "file", "order" and "graph", as `compile` prints them.

    Raises:
        CompileError: A region cannot be compiled, for example for want of a C++ compiler.
    """
    found: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()

    def collect(process: subprocess.Popen[str], units: Sequence[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with lock:
                if (record := _record(line)) is not None:
                    found[record["unit"]] = record
                    progress(len(found), len(weights))
        if process.wait() or not found.keys() >= set(units):
            raise CompileError(_reason(process, next(unit for unit in units if unit not in found), folder))

    progress(0, len(weights))
    shares = _shares(weights, min(available_cores(), len(weights)))
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(shares)))
        jobs = []
        for number, units in enumerate(shares):
            log = stack.enter_context((folder / f"{number}.log").open("w+", encoding="utf-8"))
            command = [
                sys.executable,
                "-m",
                "vlmbuild.targets.aoti.compile",
                str(program_file),
                dtype,
                device,
                str(folder),
            ]
            process = stack.enter_context(_started([*command, *units], log))
            stack.callback(process.kill)
            jobs.append(pool.submit(collect, process, units))
        for job in jobs:
            job.result()
    return found


def _started(command: list[str], log: IO[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(  # noqa: S603  (our own interpreter)
        command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **_SETTINGS}
    )


def _shares(weights: Mapping[str, int], count: int) -> list[list[str]]:
    """The units divided so that all have about as much to do."""
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for unit in sorted(weights, key=lambda unit: -weights[unit]):
        least = loads.index(min(loads))
        shares[least].append(unit)
        loads[least] += weights[unit]
    return shares


def _record(line: str) -> dict[str, Any] | None:
    """What a worker says of a unit; compilers print to stdout too."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "unit" in record else None


def _reason(process: subprocess.Popen[str], unit: str, folder: Path) -> str:
    logs = [file.read_text(encoding="utf-8", errors="replace") for file in sorted(folder.glob("*.log"))]
    lines = [line for log in logs for line in log.strip().splitlines() if "Error" in line]
    said = lines[-1].strip() if lines else f"the compiling process ended with {process.returncode}"
    return (
        f"{unit.partition(':')[2]} cannot be compiled: {said.rstrip('.')}. AOTInductor needs a C++ compiler (g++ or clang++) "
        "on the PATH and some gigabytes of memory; without these, build the trainable target."
    )

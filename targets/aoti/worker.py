"""The process that compiles an artifact's regions, several at a time.

`python -m vlmbuild.targets.aoti.worker FOLDER JOBS` reads the program as JSON from stdin and prints lines of JSON: how many
units are done, and then the index of all; or why one cannot be compiled. It imports inductor and derives the programs once;
each unit is compiled in a fork of it, where a compiler that crashes harms no other. Forks have no threads to miss: nothing is
computed before.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlmbuild.ir.program import Program
from vlmbuild.ir.serialize import from_json
from vlmbuild.kv_cache.block import CacheForm
from vlmbuild.runtime.aoti.code_index import CodeFile
from vlmbuild.runtime.aoti.platform import CodePlatform
from vlmbuild.targets.aoti.compile import compile_region, cpp_compiler, platform_compiled_for
from vlmbuild.targets.aoti.plan import CodePlan, Unit, cached_programs
from vlmbuild.targets.aoti.region_graph import compilable
from vlmbuild.util.dtypes import dtype_name

Record = dict[str, Any]


def main(folder: str, jobs: str) -> int:
    """Compile everything; returns the exit code."""
    platform, compiler = platform_compiled_for(), cpp_compiler()
    text = sys.stdin.read()
    if not text:  # there is nothing to build after all
        return 0
    asked = json.loads(text)
    programs, dtype = cached_programs(from_json(asked["program"])), asked["dtype"]
    plan = CodePlan.of(programs)
    units = sorted(plan.weights, key=lambda unit: plan.weights[unit], reverse=True)
    _say({"done": 0, "total": len(units)})
    files: dict[Unit, CodeFile] = {}

    def compiled(unit: Unit) -> Record:
        return compile_unit(programs, unit, dtype, platform, Path(folder))

    for unit, record in _forked(units, int(jobs), compiled, Path(folder)):
        if "error" in record:
            _say({"region": unit.region, **record})
            return 1
        files[unit] = CodeFile(record["file"], tuple((index, dtype) for index, dtype in record["inputs"]))
        _say({"done": len(files), "total": len(units)})
    index = plan.index(platform, dtype, files).record()
    _say({"index": index, "files": [entry.file for entry in files.values()], "compiler": compiler})
    return 0


def compile_unit(
    programs: Mapping[CacheForm, Program], unit: Unit, dtype: str, platform: CodePlatform, folder: Path
) -> Record:
    """Compile a unit into its file below a folder; returns the record of its `CodeFile`, or the "error"."""
    file = f"code/{platform.folder}/{unit.file}"
    try:
        region = programs[unit.form].regions[unit.region]
        graph, order = compilable(region, getattr(torch, dtype), one_token=unit.one_token)
        compile_region(graph, folder / file, platform.level, one_token=unit.one_token)
    except Exception as error:  # inductor's and the compiler's own, of many kinds
        traceback.print_exception(error)
        lines = [line.strip() for line in "".join(traceback.format_exception_only(error)).splitlines()]
        return {"error": next((line for line in reversed(lines) if "Error" in line), lines[0])}
    placeholders = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"][-len(order) :]
    inputs = tuple((index, dtype_name(x.dtype)) for index, x in zip(order, placeholders, strict=True))
    return CodeFile(file, inputs).record()


def _forked(
    units: Sequence[Unit], jobs: int, work: Callable[[Unit], Record], folder: Path
) -> Iterator[tuple[Unit, Record]]:
    """Run work on each unit in a process of its own, so many at a time; yields each unit with its record."""
    waiting = list(units)[::-1]
    running: dict[int, tuple[Unit, Path]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            unit, answer = waiting.pop(), folder / f"{len(waiting)}.json"
            running[_fork(lambda: work(unit), answer)] = (unit, answer)  # noqa: B023  (called in the fork, now)
        process, status = os.wait()
        unit, answer = running.pop(process)
        code = os.waitstatus_to_exitcode(status)
        yield unit, {"error": f"the compiling process ended with {code}"} if code else json.loads(answer.read_text())


def _fork(work: Callable[[], Record], answer: Path) -> int:
    """Start a process that works and writes its record; returns its id."""
    process = os.fork()
    if process:
        return process
    exit_code = 1
    try:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # compilers print, and stdout is for records
        answer.write_text(json.dumps(work()))
        exit_code = 0
    finally:  # whatever happens: what the parent does next is not for the child
        os._exit(exit_code)


def _say(record: Record) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""The process that compiles an artifact's regions, several at a time.

`python -m vlmbuild.targets.aoti.worker FOLDER JOBS` reads the program as JSON from stdin and prints lines of JSON: the
plan, and then for each unit its package, or why there is none. It imports inductor and derives the programs once; each
unit is compiled in a fork of it, where a compiler that crashes harms no other. Forks have no threads to miss: nothing
is computed before.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlmbuild.ir.program import Program
from vlmbuild.ir.serialize import from_json
from vlmbuild.kv_cache.block import CacheForm
from vlmbuild.targets.aoti.compile import compile_region, cpp_compiler, platform_compiled_for
from vlmbuild.targets.aoti.plan import CodePlan, cached_programs
from vlmbuild.targets.aoti.region_graph import compilable
from vlmbuild.targets.aoti.units import Unit
from vlmbuild.util.dtypes import dtype_name

Record = dict[str, Any]


def main(folder: str, jobs: str) -> int:
    """Compile everything, the heaviest first; returns the exit code."""
    platform, compiler = platform_compiled_for(), cpp_compiler()
    text = sys.stdin.read()
    if not text:  # there is nothing to build after all
        return 0
    asked = json.loads(text)
    programs, dtype = cached_programs(from_json(asked["program"])), asked["dtype"]
    plan = CodePlan.of(programs, platform, compiler)
    _say({"plan": plan.record()})
    waiting = sorted(plan.weights, key=lambda unit: plan.weights[unit])
    running: dict[int, Unit] = {}
    while waiting or running:
        while waiting and len(running) < int(jobs):
            unit = waiting.pop()
            running[_fork(programs, unit, dtype, platform.level, Path(folder))] = unit
        process, status = os.wait()
        _say(_result(Path(folder), running.pop(process), os.waitstatus_to_exitcode(status)))
    return 0


def _fork(programs: Mapping[CacheForm, Program], unit: Unit, dtype: str, level: str, folder: Path) -> int:
    """Start a process that compiles a unit and writes a record of it; return its id."""
    process = os.fork()
    if process:
        return process
    exit_code = 1
    try:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # compilers print, and stdout is for records
        record = _compiled(programs, unit, dtype, level, folder)
        _record_file(folder, unit).write_text(json.dumps(record), encoding="utf-8")
        exit_code = 0
    finally:  # whatever happens: what the parent does next is not for the child
        os._exit(exit_code)


def _compiled(programs: Mapping[CacheForm, Program], unit: Unit, dtype: str, level: str, folder: Path) -> Record:
    try:
        region = programs[unit.form].regions[unit.region]
        graph, order = compilable(region, getattr(torch, dtype), one_token=unit.one_token)
        file = compile_region(graph, str(unit).replace(":", "."), level, folder, one_token=unit.one_token)
    except Exception as error:  # inductor's and the compiler's own, of many kinds
        return {"unit": str(unit), "error": _reason(error)}
    placeholders = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"][-len(order) :]
    inputs = [(place, dtype_name(x.dtype)) for place, x in zip(order, placeholders, strict=True)]
    return {"unit": str(unit), "file": str(file), "inputs": inputs}


def _reason(error: Exception) -> str:
    """Return the line of an error's text that names the cause."""
    traceback.print_exception(error)
    lines = [line.strip() for line in "".join(traceback.format_exception_only(error)).splitlines()]
    return next((line for line in reversed(lines) if "Error" in line), lines[0])


def _result(folder: Path, unit: Unit, exit_code: int) -> Record:
    if exit_code:
        return {"unit": str(unit), "error": f"the compiling process ended with {exit_code}"}
    found: Record = json.loads(_record_file(folder, unit).read_text(encoding="utf-8"))
    return found


def _record_file(folder: Path, unit: Unit) -> Path:
    return folder / f"{str(unit).replace(':', '.')}.json"


def _say(record: Record) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

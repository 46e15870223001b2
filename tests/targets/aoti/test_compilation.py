"""The process that compiles, seen from the build: what it says is collected, a failure names its reason, nothing stays behind."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmbuild.errors import CompileError
from vlmbuild.ir.serialize import from_json
from vlmbuild.runtime.aoti.platform import this_platform
from vlmbuild.targets.aoti import compilation
from vlmbuild.targets.aoti.compilation import Compilation
from vlmbuild.targets.aoti.plan import CodePlan
from vlmbuild.targets.aoti.units import Unit

FIRST, SECOND = Unit("dynamic", "first"), Unit("static", "second")
PLAN = CodePlan(
    this_platform(levels=False),
    "g++ 12",
    {"dynamic": {"first": "1"}, "static": {"second": "2"}},
    {"1": FIRST, "2": SECOND},
    {"2": (0, 1)},
    {FIRST: 3, SECOND: 2},
)
PLANNED = json.dumps({"plan": PLAN.record()})


@pytest.fixture
def compiling(monkeypatch, tmp_path, built):
    """Begins a compilation with a process that reads what it is asked, and then does what a script says."""
    popen, begun = subprocess.Popen, []

    def start(script):
        file = tmp_path / "script.py"
        file.write_text(f"import os, subprocess, sys, time\nasked = sys.stdin.read()\n{script}")
        monkeypatch.setattr(
            compilation.subprocess,
            "Popen",
            lambda command, **options: popen([sys.executable, file, *command[3:]], **options),
        )
        begun.append(Compilation())
        begun[-1].__enter__()
        begun[-1].begin(built, "float32")
        return begun[-1]

    yield start
    for one in begun:
        one.__exit__(None, None, None)


def says(*lines):
    return "".join(f"print({line!r}, flush=True)\n" for line in lines)


def test_every_package_is_collected(compiling):
    records = [{"unit": str(unit), "file": f"{unit.region}.pt2", "inputs": []} for unit in (SECOND, FIRST)]
    process = compiling(says(PLANNED, *map(json.dumps, records)) + "time.sleep(600)")
    told = []
    plan, packages = process.packages(lambda *numbers: told.append(numbers))
    assert plan == PLAN
    assert packages == {SECOND: records[0], FIRST: records[1]}
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_it_gets_the_program(compiling, tmp_path, built):
    process = compiling(f"open({str(tmp_path / 'asked')!r}, 'w').write(asked)")
    with pytest.raises(CompileError):
        process.packages(lambda *_: None)
    asked = json.loads((tmp_path / "asked").read_text())
    assert asked["dtype"] == "float32"
    assert from_json(asked["program"]).variants == built.variants


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            says(PLANNED, json.dumps({"unit": str(SECOND), "error": "CppCompileError: no compiler."})),
            "second cannot be compiled: CppCompileError: no compiler. AOTInductor needs",
        ),
        (
            says(PLANNED) + "print('MemoryError: none left', file=sys.stderr)",
            "first cannot be compiled: MemoryError: none left. AOTInductor needs",
        ),
        ("sys.exit('ImportError: no torch')", "The program cannot be compiled: ImportError: no torch. AOT"),
        (
            "sys.exit('exc.InvalidCxxCompiler: none found')",
            "The program cannot be compiled: exc.InvalidCxxCompiler: none found. A",
        ),
        ("sys.exit(3)", "The program cannot be compiled: the compiling process ended with 3. AOT"),
    ],
)
def test_a_failure_names_its_reason(compiling, script, message):
    with pytest.raises(CompileError) as raised:
        compiling(script).packages(lambda *_: None)
    assert str(raised.value).startswith(message)


def test_nothing_stays_behind(compiling, tmp_path):
    child = tmp_path / "child"
    process = compiling(
        "started = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(started.pid))\n{says(PLANNED)}time.sleep(600)"
    )
    with pytest.raises(KeyboardInterrupt):
        process.packages(interrupt)
    assert process._folder.exists()
    process.__exit__(None, None, None)
    assert not process._folder.exists()
    assert ends(int(child.read_text()))


def interrupt(*_):
    raise KeyboardInterrupt


def ends(pid):
    """Whether a process does, in the seconds that a busy machine may take to end one that was killed."""
    until = time.monotonic() + 10
    while running(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not running(pid)


def running(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_build_that_never_begins_ends_its_compiler(compiling):
    with Compilation() as process:
        pass
    assert process._process.poll() is not None

"""Processes that compile: what they say is collected, one that fails names its own reason, and none stays behind."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from vlmbuild.targets.aoti import workers

from vlmbuild.errors import CompileError

SAYS = """
import json, subprocess, sys, time
program, dtype, folder, *units = sys.argv[1:]
print("g++ says hello")
for unit in units:
    if unit.endswith("broken"):
        print("Warning: no Error at all", file=sys.stderr)
        sys.exit("CppCompileError: no compiler")
    if unit.endswith("slow"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open(f"{folder}/child", "w").write(str(child.pid))
        time.sleep(600)
    print(json.dumps({"unit": unit, "file": "f", "inputs": [], "graph": "g"}), flush=True)
sys.exit(int(units[0].endswith("late")))
"""


@pytest.fixture
def compile_units(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SAYS)
    popen = subprocess.Popen
    monkeypatch.setattr(
        workers.subprocess, "Popen", lambda command, **options: popen([sys.executable, script, *command[3:]], **options)
    )
    monkeypatch.setattr(workers, "available_cores", lambda: 2)
    told = []

    def run(*units):
        weights = {unit: len(units) - number for number, unit in enumerate(units)}
        return workers.compile_units(tmp_path / "p.json", "float32", tmp_path, weights, lambda *x: told.append(x)), told

    return run


def test_every_unit_is_collected(compile_units):
    found, told = compile_units("growing:a", "growing:b", "static:c")
    assert set(found) == {"growing:a", "growing:b", "static:c"}
    assert told == [(number, 3) for number in range(4)]


def test_nothing_to_compile(compile_units):
    assert compile_units()[0] == {}


def test_a_process_that_ends_badly_after_its_work_has_done_it(compile_units):
    assert set(compile_units("growing:late")[0]) == {"growing:late"}


def test_the_first_failure_ends_all(compile_units, tmp_path):
    with pytest.raises(
        CompileError, match=r"^broken cannot be compiled: CppCompileError: no compiler\. AOTInductor needs"
    ):
        compile_units("growing:slow", "growing:broken")
    file = tmp_path / "child"
    if file.exists():
        assert ends(int(file.read_text()))


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

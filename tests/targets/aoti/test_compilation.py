"""The process that compiles, seen from the build: its output is collected, a failure names its reason, nothing stays behind."""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from vlmbuild.errors import CompileError
from vlmbuild.ir.serialize import from_json
from vlmbuild.targets.aoti.compilation import Compilation, inductor_cache
from vlmbuild.util import child

STARTED = json.dumps({"done": 0, "total": 2})


@pytest.fixture
def compiling(monkeypatch, tmp_path, built):
    """Begins a compilation with a process that reads what it is asked, and then does what a script says."""
    popen, begun = subprocess.Popen, []

    def start(script):
        file = tmp_path / "script.py"
        file.write_text(f"import os, subprocess, sys, time\nasked = sys.stdin.read()\n{script}")
        monkeypatch.setattr(
            child.subprocess,
            "Popen",
            lambda command, **options: popen([sys.executable, file, *command[3:]], **options),
        )
        begun.append(Compilation.begun())
        process = begun[-1].__enter__()
        process.compile(built, "float32")
        return process

    yield start
    for one in begun:
        one.__exit__(None, None, None)


def says(*lines):
    return "".join(f"print({line!r}, flush=True)\n" for line in lines)


def test_every_package_is_collected(compiling):
    result = {"index": {"dtype": "float32"}, "files": ["code/a.pt2", "code/b.pt2"], "compiler": "g++ 12"}
    lines = [STARTED, *(json.dumps({"done": done, "total": 2}) for done in (1, 2)), json.dumps(result)]
    process = compiling(says(*lines) + "time.sleep(600)")
    told = []
    code = process.result(lambda *numbers: told.append(numbers))
    assert (code.index, code.compiler) == (result["index"], "g++ 12")
    assert code.files == {name: process.folder / name for name in result["files"]}
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_it_gets_the_program(compiling, tmp_path, built):
    process = compiling(f"open({str(tmp_path / 'asked')!r}, 'w').write(asked)")
    with pytest.raises(CompileError):
        process.result(lambda *_: None)
    asked = json.loads((tmp_path / "asked").read_text())
    assert asked["dtype"] == "float32"
    assert from_json(asked["program"]).variants == built.variants


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            says(STARTED, json.dumps({"region": "second", "error": "CppCompileError: no compiler."})),
            "second cannot be compiled: CppCompileError: no compiler. AOTInductor needs",
        ),
        (
            says(STARTED) + "print('MemoryError: none left', file=sys.stderr)",
            "The program cannot be compiled: MemoryError: none left. AOTInductor needs",
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
        compiling(script).result(lambda *_: None)
    assert str(raised.value).startswith(message)


def test_nothing_stays_behind(compiling, tmp_path):
    child = tmp_path / "child"
    process = compiling(
        "started = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(started.pid))\n{says(STARTED)}time.sleep(600)"
    )
    with pytest.raises(KeyboardInterrupt):
        process.result(interrupt)
    assert process.folder.exists()
    process.process.__exit__(None, None, None)
    assert ends(int(child.read_text()))


def interrupt(*_):
    raise KeyboardInterrupt


def ends(pid):
    """Return whether a process ends, in the seconds that a busy machine may take after a kill."""
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
    with Compilation.begun() as compilation:
        pass
    assert compilation.process._process.poll() is not None
    assert not compilation.folder.exists()


@pytest.mark.parametrize("name", ["with space", "with'quote", "with$dollar"])
def test_compilers_get_a_cache_whose_path_needs_no_quotes(name, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    with inductor_cache() as settings:
        link = settings["TORCHINDUCTOR_CACHE_DIR"]
        assert shlex.quote(link) == link
        assert Path(link).resolve() == tmp_path / name / "torchinductor"
    assert not Path(link).exists()
    assert (tmp_path / name / "torchinductor").is_dir()


def test_a_plain_cache_stays_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with inductor_cache() as settings:
        assert settings == {}

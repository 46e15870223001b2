"""The compiling process: every unit in a fork of its own, and what becomes of each is said."""

import io
import json
import os
import signal

import pytest

from vlmbuild.ir.serialize import to_json
from vlmbuild.runtime.aoti.code_index import CodeIndex
from vlmbuild.runtime.aoti.platform import this_platform
from vlmbuild.targets.aoti import worker


def compile_region(graph, package, level, *, one_token):
    """Compile a region as inductor may."""
    print("g++ says hello")
    package.parent.mkdir(parents=True, exist_ok=True)
    package.write_bytes(b"code")


def without_compiler(*_, **__):
    raise RuntimeError("CppCompileError: no compiler\nmore of it")


def crash(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def work(built, programs, monkeypatch, tmp_path, capfd):
    """Run the worker with another compiler: exit code, records."""
    monkeypatch.setattr(worker, "platform_compiled_for", lambda: this_platform(levels=False))
    monkeypatch.setattr(worker, "cached_programs", lambda _: programs)
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"program": to_json(built), "dtype": "float32"})))

    def work(compile_region, folder=tmp_path, jobs="1"):
        monkeypatch.setattr(worker, "compile_region", compile_region)
        code = worker.main(str(folder), jobs)
        return code, [json.loads(line) for line in capfd.readouterr().out.splitlines()]

    return work


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_every_unit_is_compiled_and_in_the_index(work, tmp_path, jobs):
    code, (*steps, result) = work(compile_region, jobs=jobs)
    assert code == 0
    assert steps == [{"done": done, "total": 4} for done in range(5)]
    index = CodeIndex.from_record(result["index"])
    named = {file for regions in index.regions.values() for entry in regions.values() for file in entry.files}
    assert {file.file for file in named} == set(result["files"])
    assert all((tmp_path / name).read_bytes() == b"code" for name in result["files"])
    block = index.regions["static"]["language_model.layers.cached"]
    assert block.token is not None
    assert all(sorted(index for index, _ in file.inputs) == list(range(7)) for file in block.files)


@pytest.mark.parametrize(
    ("compiler", "error"),
    [(without_compiler, "RuntimeError: CppCompileError: no compiler"), (crash, "the compiling process ended with -9")],
)
def test_a_unit_that_fails_says_why(work, compiler, error):
    code, (_, record) = work(compiler)
    assert code == 1
    assert record["error"] == error
    assert record["region"] in ("visual.blocks", "language_model.layers.cached")


def test_a_build_that_failed_early_asks_for_nothing(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(worker, "platform_compiled_for", lambda: this_platform(levels=False))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert worker.main(str(tmp_path), "1") == 0
    assert capfd.readouterr().out == ""


def test_a_fork_that_cannot_write_ends(work, tmp_path):
    """It does not go on as if it were the process that forked it."""
    code, records = work(lambda *_, **__: None, tmp_path / "missing")
    assert (code, len(records)) == (1, 2)
    assert records[1]["error"] == "the compiling process ended with 1"

"""The compiling process: every unit in a fork of its own, and what becomes of each is said."""

import io
import json
import os
import signal

import pytest

from vlmbuild.ir.serialize import to_json
from vlmbuild.runtime.aoti.platform import this_platform
from vlmbuild.targets.aoti import worker
from vlmbuild.targets.aoti.plan import CodePlan
from vlmbuild.targets.aoti.units import Unit


def compile_region(graph, name, level, folder, *, one_token):
    """What inductor may do."""
    print("g++ says hello")
    if name.startswith("dynamic.visual"):
        raise RuntimeError("CppCompileError: no compiler\nmore of it")
    if one_token:
        os.kill(os.getpid(), signal.SIGKILL)
    file = folder / f"{name}.pt2"
    file.write_bytes(b"code")
    return file


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_what_becomes_of_every_unit_is_said(built, monkeypatch, tmp_path, capfd, jobs):
    monkeypatch.setattr(worker, "platform_compiled_for", lambda: this_platform(levels=False))
    monkeypatch.setattr(worker, "compile_region", compile_region)
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"program": to_json(built), "dtype": "float32"})))
    assert worker.main(str(tmp_path), jobs) == 0
    first, *records = map(json.loads, capfd.readouterr().out.splitlines())
    plan = CodePlan.from_record(first["plan"])
    said = {record["unit"]: record for record in records}
    assert said.keys() == set(map(str, plan.weights))
    block = Unit("static", "language_model.layers.cached")
    assert said["dynamic:visual.blocks"]["error"] == "RuntimeError: CppCompileError: no compiler"
    assert said[str(block.of_token())]["error"] == "the compiling process ended with -9"
    assert (tmp_path / "static.language_model.layers.cached.pt2").read_bytes() == b"code"
    assert sorted(place for place, _ in said[str(block)]["inputs"]) == list(range(7))


def test_a_build_that_failed_early_asks_for_nothing(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(worker, "platform_compiled_for", lambda: this_platform(levels=False))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert worker.main(str(tmp_path), "1") == 0
    assert capfd.readouterr().out == ""


def test_a_fork_that_cannot_write_ends(built, monkeypatch, tmp_path, capfd):
    """It does not go on as if it were the process that forked it."""
    monkeypatch.setattr(worker, "platform_compiled_for", lambda: this_platform(levels=False))
    monkeypatch.setattr(worker, "compile_region", compile_region)
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"program": to_json(built), "dtype": "float32"})))
    assert worker.main(str(tmp_path / "missing"), "2") == 0
    first, *records = map(json.loads, capfd.readouterr().out.splitlines())
    assert len(records) == len(first["plan"]["weights"])
    assert {record["error"] for record in records} == {f"the compiling process ended with {code}" for code in (1, -9)}

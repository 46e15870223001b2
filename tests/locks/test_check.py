"""A check of a lock that does not hold says so to people, to CI servers and by its exit code. `test_published_configs.py`
checks the committed ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from make_locks import LOCKS

from vlmbuild.cli import main
from vlmbuild.locks.check import check, lock_files
from vlmbuild.locks.document import read_lock

ONE = lock_files([LOCKS])[0]


@pytest.fixture(scope="module")
def locks(tmp_path_factory):
    """Locks of a packaged checkpoint, without kernels, so that it takes seconds."""
    folder = tmp_path_factory.mktemp("locks")
    for form in ("none", "nf4"):
        path = folder / f"digits-{form}.lock"
        options = ("--quantize", form, "--attention", "sdpa", "--no-kernels")
        assert main(["lock", "qwen2-vl-digits", "-o", str(path), *options]) == 0
    return folder


def spoiled(path: Path, target: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    target.write_text(text.replace(old, new))
    return target


@pytest.mark.slow
def test_models_are_divided_among_processes(locks, tmp_path):
    """Results are in the order of the paths."""
    bad = spoiled(locks / "digits-none.lock", tmp_path / "bad.lock", "Qwen2VLForConditionalGeneration", "UnknownModel")
    files = [bad, locks / "digits-nf4.lock"]
    results = check(files, kernels=False, processes=2)
    assert [result.path for result in results] == files
    assert [result.fails() for result in results] == [True, False]


def test_a_model_is_traced_once(locks, monkeypatch):
    import vlmbuild.locks.check as check_module

    calls = []
    original = check_module.trace
    monkeypatch.setattr(check_module, "trace", lambda *arguments: calls.append(arguments) or original(*arguments))
    results = check([locks], kernels=False, processes=1)
    assert [result.path.name for result in results] == ["digits-nf4.lock", "digits-none.lock"]
    assert len(calls) == 1


def test_check_says_what_changed(run, locks, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    bad = spoiled(locks / "digits-none.lock", tmp_path / "bad.lock", 'input_ids = "i64', 'input_ids = "i32')
    report = tmp_path / "check.xml"
    code, out, err = run("check", bad, locks / "digits-nf4.lock", "--no-kernels", "--junit", report, "--processes", 1)
    assert code == 6
    assert "input input_ids of variant image: i32[1, sequence] → i64[1, sequence]" in " ".join(out.split())
    summary = out.partition("\n\n")[0].splitlines()
    assert summary[0] == "2 locks, 1 failed" and "bad" in summary[1] and len(summary) <= 10
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 80
    assert "digits-nf4.lock: no difference" in out
    assert "\x1b" not in out
    assert err.startswith("error: 1 lock differs from the code: bad.")
    suite = ElementTree.parse(report).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "0")
    assert "input_ids" in suite.find("testcase/failure").text


def test_check_for_a_pull_request_and_for_machines(run, locks, tmp_path):
    bad = spoiled(locks / "digits-none.lock", tmp_path / "bad.lock", "aten.silu.default(", "aten.gelu.default(")
    code, out, _ = run("check", bad, "--no-kernels", "--format", "markdown")
    assert code == 6
    for text in ("### `bad`", "**Values may change**", "```diff", "<details>"):
        assert text in out
    code, out, _ = run("check", bad, "--no-kernels", "--json")
    document = json.loads(out)
    assert (code, document["locks"][0]["findings"][0]["severity"]) == (6, "numerics")


def test_severities_below_the_limit_do_not_fail(run, locks, tmp_path):
    bad = spoiled(locks / "digits-none.lock", tmp_path / "bad.lock", 'flops = "', 'flops = "1')
    assert run("check", bad, "--no-kernels")[0] == 6
    assert run("check", bad, "--no-kernels", "--fail-on", "cost")[0] == 0
    assert run("check", bad, "--no-kernels", "--fail-on", "interface")[0] == 0


def test_update_rewrites_the_lock(run, locks, tmp_path):
    good = (locks / "digits-none.lock").read_text()
    bad = spoiled(locks / "digits-none.lock", tmp_path / "bad.lock", "instances = 3", "instances = 4")
    code, out, err = run("check", bad, "--no-kernels", "--update")
    assert (code, "occurs 4 → 3 times" in out, "bad.lock: updated" in err) == (0, True, True)
    assert bad.read_text() == good


def test_update_keeps_kernels_that_were_not_compiled(run, locks, tmp_path):
    row = '{ tile = "", registers = 8, spilled = 0, shared = 0, tensor_core = "none", cubin = 9 }'
    kernels = f'[kernels."rotate_kernel bf16"]\nregions = ["visual.blocks"]\nsm_90 = {row}\n'
    bad = spoiled(locks / "digits-none.lock", tmp_path / "bad.lock", "instances = 3", "instances = 4")
    bad.write_text(bad.read_text().replace('[kernels]\nskipped = "not asked for"\n', kernels))
    assert run("check", bad, "--no-kernels", "--update")[0] == 0
    assert read_lock(bad).kernels.table["rotate_kernel bf16"].targets["sm_90"]["registers"] == 8


def test_update_rewrites_locks_of_other_versions(run, locks, tmp_path):
    bad = tmp_path / "bad.lock"
    bad.write_text(re.sub(r'\ntorch = ".*"', '\ntorch = "2.0.0"', (locks / "digits-none.lock").read_text()))
    code, out, _ = run("check", bad, "--no-kernels")
    assert (code, "torch 2.0.0 →" in out) == (0, True)
    assert run("check", bad, "--no-kernels", "--update")[0] == 0
    assert bad.read_text() == (locks / "digits-none.lock").read_text()


def test_update_into_a_place_that_takes_nothing(run, locks, tmp_path, monkeypatch):
    bad = spoiled(locks / "digits-none.lock", tmp_path / "bad.lock", "instances = 3", "instances = 4")
    before = bad.read_text()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    code, _, err = run("check", bad, "--no-kernels", "--update")
    assert (code, "bad.lock cannot be written: Permission denied" in err) == (1, True)
    assert (bad.read_text(), sorted(tmp_path.iterdir())) == (before, [bad])


def test_one_lock_that_is_spoiled_leaves_the_report_of_the_others(run, locks, tmp_path):
    (tmp_path / "a.lock").write_text("<<<<<<< HEAD\n")
    (tmp_path / "b.lock").write_text((locks / "digits-none.lock").read_text())
    report = tmp_path / "reports" / "check.xml"
    code, out, err = run("check", tmp_path, "--no-kernels", "--junit", report)
    shown = " ".join(out.split())
    assert code == 2 and "a.lock: cannot be compared" in shown and "b.lock: no difference" in shown
    assert "1 lock cannot be read: a." in err
    suite = ElementTree.parse(report).getroot()
    assert (suite.get("failures"), suite.get("errors")) == ("0", "1")


def test_a_lock_that_differs_comes_before_one_that_cannot_be_read(run, locks, tmp_path):
    (tmp_path / "a.lock").write_text("<<<<<<< HEAD\n")
    spoiled(locks / "digits-none.lock", tmp_path / "b.lock", 'flops = "', 'flops = "1')
    code, out, _ = run("check", tmp_path, "--no-kernels", "--json")
    assert code == 6 and [lock["fails"] for lock in json.loads(out)["locks"]] == [True, True]
    (tmp_path / "b.lock").unlink()
    code, out, _ = run("check", tmp_path, "--json")
    assert code == 2 and "a.lock" in json.loads(out)["locks"][0]["error"]


def test_the_report_for_ci_servers_fails_where_the_command_does(run, locks, tmp_path):
    bad = spoiled(locks / "digits-none.lock", tmp_path / "bad.lock", 'flops = "', 'flops = "1')
    report = tmp_path / "check.xml"
    assert run("check", bad, "--no-kernels", "--junit", report, "--fail-on", "interface")[0] == 0
    assert ElementTree.parse(report).getroot().get("failures") == "0"


def test_a_model_that_cannot_be_traced_is_an_error_of_its_lock(run, locks, tmp_path):
    bad = spoiled(
        locks / "digits-none.lock", tmp_path / "bad.lock", "Qwen2VLForConditionalGeneration", "UnknownForGeneration"
    )
    code, out, _ = run("check", bad, "--no-kernels")
    assert code == 6
    assert "cannot be compared: zoo:qwen2-vl-digits: unknown architecture UnknownForGeneration" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("check", "{tmp}"), 2, "holds no lock"),
        (("check", "{tmp}/missing.lock"), 2, "holds no lock"),
        (("diff", str(ONE), str(ONE), "--quantize", "nf4"), 2, "have their own recipe"),
        (("inspect", "art", "--html", "x.html", "--format", "dot"), 2, "exclude each other"),
        (("check",), 2, "LOCKS"),
        (("diff", "{tmp}/missing.lock", "qwen2-vl-digits"), 2, "cannot be read"),
        (("lock", "qwen2-vl-digits"), 2, "--output"),
        (("lock", "no-such-model", "-o", "{tmp}/x.lock"), 1, "not a directory, a hub id"),
        (("lock", "qwen2-vl-digits", "-o", "{tmp}/x.lock", "--quantize", "auto", "--budget", "5"), 2, "auto measures"),
        (("lock", "qwen2-vl-digits", "-o", "{tmp}/x.lock", "--require", "no_such_pass"), 1, "no_such_pass"),
    ],
)
def test_mistakes_are_one_paragraph(run, arguments, code, message, tmp_path):
    found, out, err = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["lock", "check", "diff"])
def test_help_has_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"vlmbuild {command}" in out.partition("Example")[2]


def test_locks_name_no_path(locks):
    for file in lock_files([locks, LOCKS]):
        assert str(Path.home()) not in file.read_text()
        assert read_lock(file).source in ("zoo:qwen2-vl-digits", f"tests/configs/{file.stem.rsplit('-', 2)[0]}")

"""The training log in a plain loop: its figures, its file, and what it says when the file cannot be written."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import vlmbuild
from vlmbuild.errors import OutputError
from vlmbuild.train import log as training_log


def test_figures_of_an_entry(monkeypatch, tmp_path, capsys):
    times = iter([10.0, 12.0, 12.5])
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(training_log, "peak_memory", lambda: 3 * 2**20)
    log = vlmbuild.TrainingLog(tmp_path / "new" / "log.jsonl")
    first, second = log.step(100, torch.tensor(0.5), samples=4), log.step(10, 0.25)
    assert (first.step, first.tokens_per_second, first.samples_per_second) == (1, 50.0, 2.0)
    assert (second.step, second.tokens_per_second, second.samples_per_second) == (2, 20.0, None)
    lines = [json.loads(line) for line in (tmp_path / "new" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [0.5, 0.25] and lines[0]["peak_memory"] == 3 * 2**20
    assert "loss 0.5000  50 tokens/s  2.0 samples/s  peak 3 MiB" in capsys.readouterr().out


def test_peak_memory_grows_with_what_is_held():
    """In a process of its own: a peak of earlier tests would hide this one."""
    script = (
        "import torch; from vlmbuild.train.log import peak_memory; before = peak_memory(); held = torch.ones(2**26); "
        "assert peak_memory() > max(before, held.nbytes)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_compilations_are_counted():
    torch._dynamo.reset()
    log = vlmbuild.TrainingLog(show=None)
    before = log.step(1, 0.0).compilations
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert log.step(1, 0.0).compilations == before + 1


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="training log cannot be written to .*Choose another file"):
        vlmbuild.TrainingLog(tmp_path / "file" / "log.jsonl", show=None).step(1, 0.0)

"""The benchmark of the kernels, on small sizes: every call and every peer runs and agrees before a long run is begun."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is Linux only")

from tests.bench import kernel_problems, kernel_sides, kernels
from tests.bench.kernels import smoke


def test_every_kernel_and_peer_runs_and_agrees():
    rows = list(smoke())
    assert {row["name"].partition(":")[0] for row in rows} == {
        "attention forward",
        "attention backward",
        "attention of one row",
        "rotation forward",
        "rotation backward",
        "cross-entropy with gradient",
        "linear and cross-entropy with gradients",
        "sum and RMSNorm by inductor",
    }
    assert {peer for row in rows for peer in row["peers"]} >= {"flex", "sdpa", "transformers eager"}
    assert all(isinstance(distance, float) for row in rows for distance in row["peers"].values()), rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own clock and memory are there")
def test_a_run_on_a_gpu_writes_what_it_measures(monkeypatch, tmp_path, capsys):
    """All but the clock and the memory of the GPU is the real thing."""
    gpu = {
        "is_available": lambda: True,
        "get_device_capability": lambda: (9, 0),
        "get_device_name": lambda: "Some Chip",
        "synchronize": lambda: None,
        "memory_allocated": lambda: 3,
        "max_memory_allocated": lambda: 5,
        "reset_peak_memory_stats": lambda: None,
    }
    for name, function in gpu.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr("triton.testing.do_bench", lambda call, **_: (call(), (2.0, 1.0, 3.0))[1])
    setting = kernel_sides.Setting("cpu", torch.float16)
    monkeypatch.setattr(kernel_sides, "Setting", lambda *_: setting)
    monkeypatch.setattr(kernel_problems, "problems", kernel_problems.small_problems)
    output = tmp_path / "kernels.json"
    monkeypatch.setattr("sys.argv", ["kernels", "--only", "cross-entropy", "--output", str(output)])
    kernels.main()
    found = json.loads(output.read_text())
    assert (found["device"], len(found["rows"])) == ("Some Chip", 2)
    for row in found["rows"]:
        assert (row["median_ms"], row["peak_bytes"], row["limited_by"]) == (2.0, 2.0, "memory")
        assert row["share"] == row["limit_ms"] / 2
        assert all(peer["host_us"] > 0 for peer in row["peers"].values())
    assert "linear and cross-entropy: no slower than transformers" in capsys.readouterr().out

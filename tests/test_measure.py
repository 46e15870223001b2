"""The GPU measurement rehearsed on a CPU: every part runs on tiny sizes, and leaves a JSON file that says how it went."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # rehearses every part of the GPU measurement

pytest.importorskip("triton", reason="triton is Linux only")

SCRIPT = Path(__file__).parent / "gpu" / "measure.sh"
PARTS = {"kernels", "attention", "lora_step", "linear", "rotary_loss", "memory", "decode", "families"}
REASONS = ("GPU", "compute-sanitizer", "not installed", "the rehearsal", "on a CPU")
"""Parts of the reasons for which a row may be left out."""


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    out = tmp_path_factory.mktemp("measure")
    done = subprocess.run(
        ["bash", str(SCRIPT), "--rehearse", str(out)], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr + (out / "summary.md").read_text()
    return out


def test_every_part_runs_and_says_what_it_left_out(rehearsal):
    contents = {file.stem: json.loads(file.read_text()) for file in rehearsal.glob("*.json")}
    assert contents.keys() == PARTS
    for name, content in contents.items():
        assert content["status"] in ("ok", "partial"), (name, content)
        assert content["rehearsal"]
        assert content["device"].startswith("none")
        assert {"torch", "triton", "transformers"} <= content["versions"].keys()
        for row in content["rows"]:
            assert "failed" not in row
            peers = row.get("peers", {}).values()
            reasons = [row.get("skipped"), *(peer.get("missing") for peer in peers)]
            assert all(any(known in reason for known in REASONS) for reason in reasons if reason), row
    summary = (rehearsal / "summary.md").read_text()
    assert all(f"## {name}: " in summary for name in PARTS)


def test_results_are_compared(rehearsal):
    """Kernels with float64, models with transformers on the same weights."""
    rows = [row for file in rehearsal.glob("*.json") for row in json.loads(file.read_text())["rows"]]
    assert sum(row.get("right") is True for row in rows) >= 12
    assert sum(row.get("passed", 0) for row in rows) >= 1


def test_limits_of_the_parts_add_up_to_less_than_ten_minutes():
    from tests.gpu.measure.__main__ import PARTS as LIMITS

    assert LIMITS.keys() == PARTS
    assert sum(seconds for _, seconds in LIMITS.values()) < 570


def test_wheels_are_listed_within_the_limit():
    done = subprocess.run(["bash", str(SCRIPT), "--wheels"], capture_output=True, text=True, check=True)
    total = float(done.stdout.splitlines()[-1].split()[0])
    assert "bitsandbytes" in done.stdout
    assert total < 64


def test_a_part_that_does_not_exist_is_named(tmp_path):
    done = subprocess.run(
        ["bash", str(SCRIPT), "--rehearse", str(tmp_path), "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "nonsense" in done.stderr
    assert "attention" in done.stderr

"""The kernels' benchmark without a GPU: committed estimates say what they are, goals are judged, tiles are chosen by time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is Linux only")

from tests.bench.kernel_bars import BARS, judged
from tests.bench.kernel_cases import resource_cases
from tests.bench.kernel_estimates import estimates
from tests.bench.kernel_limits import ARCHITECTURES
from tests.bench.kernel_problems import problems
from tests.bench.kernel_tune import fastest, fitting, launches_of, wanted
from vlmbuild.locks.kernel_table import TARGETS
from vlmbuild.ops import tiles

ROOT = Path(__file__).parents[1]
COMMITTED = json.loads((ROOT / "artifacts" / "benchmarks" / "kernel_estimates.json").read_text())


def test_committed_estimates_are_of_these_kernels_and_tiles():
    """Nothing is compiled here: locks hold what compilers make of the kernels."""
    known = {(row["kernel"], row["target"]): row for row in COMMITTED["resources"]}
    for case in resource_cases():
        for target in TARGETS:
            row, tile = known.pop((case.name, f"sm_{target}")), case.launch(target).tile
            assert f"{tile['num_warps']} warps, {tile['num_stages']} stages" in row["tile"]
            assert (row["spilled"], row["resident"] > 0) == (0, True)
    assert not known
    assert list(estimates(COMMITTED["resources"])) == COMMITTED["estimates"]


def test_no_estimate_is_called_a_measurement_or_beats_its_limit():
    assert "nothing was timed" in COMMITTED["device"]
    for row in COMMITTED["estimates"]:
        assert "median_ms" not in row
        for target in TARGETS:
            assert row[f"sm_{target}"]["estimated_ms"] >= row[f"sm_{target}"]["limit_ms"] > 0


def test_the_readmes_table_is_the_committed_one():
    lines = (ROOT / "README.md").read_text().partition("## Triton kernels")[2].splitlines()
    known = {}
    for row in COMMITTED["estimates"]:
        name = f"{row['kernel']}: " + ", ".join(f"{key} {value}" for key, value in row["sizes"].items())
        known[name] = [str(row["sm_90"][key]) for key in ("limit_ms", "limited_by", "estimated_ms")]
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("| ") and ": " in line
    ]
    assert len(table) > 8
    assert all(known[name] == cells for name, *cells in table)


def measured(factor: float):
    """Rows as a GPU would give them if every kernel took its limit times a factor, and every peer twice the limit."""
    chip = ARCHITECTURES[90]
    for problem in problems():
        seconds, bound = problem.limit(chip)
        limit = 1e3 * seconds
        peer = {"median_ms": 2 * limit, "peak_bytes": 200}
        row = {"kernel": problem.kernel, "name": problem.name, "sizes": problem.sizes, "flops": problem.flops}
        row["limited_by"] = bound
        peers = dict.fromkeys(("flex", "liger", "16-bit weight", "transformers"), peer)
        peers["transformers eager"] = {"median_ms": 20 * limit}
        yield row | {"median_ms": factor * limit, "share": 1 / factor, "peak_bytes": 100 * factor, "peers": peers}


def test_goals():
    held = judged(list(measured(1.05)))
    assert len(held) == len(BARS)
    assert all(bar["held"] for bar in held)
    missed = judged(list(measured(4)))
    assert not any(bar["held"] for bar in missed if "of the dense d128 rate" not in bar["bar"])  # all are as slow
    assert all(bar["held"] is None for bar in judged([]))


def test_a_peer_that_is_missing_holds_no_goal():
    rows = [row | {"peers": {"liger": {"missing": "ImportError"}}} for row in measured(1)]
    unknown = [bar["bar"] for bar in judged(rows) if bar["held"] is None]
    assert len(unknown) == 7
    assert any("Liger" in bar for bar in unknown)


def test_every_entry_of_the_table_can_be_tuned():
    entries = {(kernel, size) for kernel, size, _ in wanted()}
    table = {
        (kernel, int(size))
        for kernel, sizes in tiles.known_tiles()["sm_90"].items()
        if "float32" not in kernel
        for size in sizes
    }
    assert entries >= table
    for kernel, size, candidates in wanted():
        assert all(
            launch.tile["num_warps"] == candidates[0][-2] for launch in launches_of(kernel, size, 90, candidates[0])
        )


def test_candidates_that_spill_do_not_fit_or_promise_little_are_not_timed():
    def compiled(launch, target):
        rows = launch.tile["ROWS"]
        return {
            "spilled": int(rows == 16),
            "shared": 300_000 if rows == 32 else 40_000,
            "registers": 100,
            "tensor_core": "wgmma",
        }

    candidates = [(16, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2), (1, 1, 4, 1)]
    assert fitting("attention_forward", 64, candidates, 90, ARCHITECTURES[90], compiled) == [(64, 64, 4, 2)]
    assert fitting("attention_forward", 64, candidates[:1], 90, ARCHITECTURES[90], compiled) == []


def test_the_fastest_tile_goes_before_the_architectures(monkeypatch):
    table = {"sm_90": {"linear_4bit": {"16": [64, 64, 4, 3]}}}
    monkeypatch.setattr(tiles, "known_tiles", lambda: table)
    monkeypatch.setattr(tiles, "_chip", lambda target: ("Some Chip",))

    def look():
        return tiles.tile_of("linear_4bit", 16, torch.float16, 90)["OUTS"]

    assert look() == 64
    try:
        best = fastest(
            "linear_4bit",
            16,
            [(32, 64, 4, 3), (128, 64, 4, 3), (256, 64, 4, 3)],
            "Some Chip",
            lambda: math.fabs(look() - 120),
        )
        assert (best, look()) == ((128, 64, 4, 3), 128)
        assert table["Some Chip"] == {"linear_4bit": {"16": [128, 64, 4, 3]}}
    finally:
        tiles.tile_of.cache_clear()

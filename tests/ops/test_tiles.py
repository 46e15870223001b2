"""The table of tiles: whole for every architecture, looked up by size, and a measured chip before its architecture."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is Linux only")

from tests.gpu.measure.record import write_measurement
from vlmbuild.ops import tiles
from vlmbuild.ops.tiles import architecture, tile_of

KERNELS = ("attention_forward", "attention_grad_query", "attention_grad_key")


@pytest.mark.parametrize("target", [80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_a_tile_everywhere(kernel, target):
    for size in (1, 16, 64, 80, 256):
        tile = tile_of(kernel, size, torch.bfloat16, target)
        assert set(tile) == {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"}
        assert all(value & (value - 1) == 0 for name, value in tile.items() if name != "num_stages")


def test_float32_has_tiles_of_its_own():
    for kernel in KERNELS:
        for dim in (64, 80, 128):
            assert tile_of(kernel, dim, torch.float32, 90)["num_stages"] >= 1
    assert tile_of("attention_forward", 128, torch.float32, 90) != tile_of("attention_forward", 128, torch.bfloat16, 90)


def test_architectures():
    assert [architecture(target) for target in (80, 86, 89, 90, 100, 103, 120)] == [
        "sm_80",
        "sm_80",
        "sm_80",
        "sm_90",
        "sm_100",
        "sm_100",
        "sm_80",
    ]


def test_sizes(monkeypatch):
    row = {"64": [1, 2, 4, 8], "128": [16, 32, 4, 2]}
    monkeypatch.setattr(tiles, "tables", lambda: {"tiles": {"sm_90": {"attention_forward": row}}})
    lookup = tile_of.__wrapped__
    assert lookup("attention_forward", 64, torch.float16, 90)["BLOCK_M"] == 1
    assert lookup("attention_forward", 65, torch.float16, 90)["BLOCK_M"] == 16
    assert lookup("attention_forward", 512, torch.float16, 90)["BLOCK_N"] == 32


def fake(monkeypatch, **rows):
    monkeypatch.setattr(tiles, "tables", lambda: {"measured": {"sm_90": rows}})


@pytest.mark.parametrize(
    ("row", "measured"),
    [
        ({"right": True, "ratio": 0.8}, True),
        ({"right": True, "ratio": 1.0}, True),
        ({"right": True, "ratio": 1.01}, False),
        ({"right": False, "ratio": 0.5}, False),
    ],
)
def test_a_kernel_is_measured_where_it_is_right_and_no_slower(monkeypatch, row, measured):
    fake(monkeypatch, attention=row)
    assert tiles.is_measured("attention", 90) == measured
    assert not tiles.is_measured("attention", 80)
    assert not tiles.is_measured("rope", 90)


def test_no_estimate_counts_as_a_measurement():
    """Rows of the package's own file come from a GPU; there are none."""
    assert json.loads(tiles.FILE.read_text())["measured"] == {}


def test_a_benchmark_writes_what_is_read(monkeypatch, tmp_path):
    before = tiles.FILE.read_text()
    file = tmp_path / "tiles.json"
    file.write_text(before)
    entry = {"device": "Some Chip", "right": True, "ratio": 0.712}
    write_measurement(file, "rope", 90, entry)
    write_measurement(file, "attention", 90, {**entry, "ratio": 1.2})
    monkeypatch.setattr(tiles, "tables", lambda: json.loads(file.read_text()))
    assert tiles.is_measured("rope", 90)
    assert not tiles.is_measured("attention", 90)
    assert file.read_text().startswith(before.partition('  "measured"')[0])


def test_cpu_tensors_never_take_our_kernels(monkeypatch):
    fake(monkeypatch, rope={"right": True, "ratio": 0.1})
    assert not tiles.runs_by_default("rope", torch.ones(1))

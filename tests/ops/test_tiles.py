"""The table of tiles: whole for every architecture, looked up by size, and a measured chip before its architecture."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is Linux only")

from vlmbuild.ops import tiles
from vlmbuild.ops.tiles import SIDES, architecture, tile_of


@pytest.mark.parametrize("target", [80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("kernel", SIDES)
def test_every_kernel_has_a_tile_everywhere(kernel, target):
    for size in (1, 16, 64, 80, 256):
        tile = tile_of(kernel, size, torch.bfloat16, target)
        assert set(tile) == {*SIDES[kernel], "num_warps", "num_stages"}
        assert all(value & (value - 1) == 0 for name, value in tile.items() if name != "num_stages")


def test_float32_has_tiles_of_its_own():
    for kernel in ("attention_forward", "attention_grad_query", "attention_grad_key", "attention_decode"):
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


def test_sizes_and_chips(monkeypatch):
    table = {
        "sm_90": {"attention_forward": {"64": [1, 2, 4, 8], "128": [16, 32, 4, 2]}},
        "Some Chip": {"attention_forward": {"128": [64, 64, 8, 3]}},
    }
    monkeypatch.setattr(tiles, "known_tiles", lambda: table)
    lookup = tile_of.__wrapped__
    assert lookup("attention_forward", 65, torch.float16, 90)["ROWS"] == 16
    assert lookup("attention_forward", 64, torch.float16, 90)["ROWS"] == 1
    assert lookup("attention_forward", 512, torch.float16, 90)["KEYS"] == 32
    monkeypatch.setattr(tiles, "_chip", lambda target: ("Some Chip",))
    assert lookup("attention_forward", 64, torch.float16, 90) == {
        "ROWS": 64,
        "KEYS": 64,
        "num_warps": 8,
        "num_stages": 3,
    }

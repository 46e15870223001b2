"""What GPUs can do at most, and an estimate of how near a tile of attention comes to it, from registers and shared memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """Vendor figures of one chip of an architecture.

    Attributes:
        chip: Which.
        processors: Streaming multiprocessors.
        clock: Boost clock, Hz.
        bandwidth: Of its memory, bytes a second.
        tensor: Dense bfloat16 FLOPs a second of its tensor cores.
        shared: Shared memory of a multiprocessor, bytes.
        shared_block: The most that one block takes on this and on every chip that uses this entry, bytes.
        mma: Share of `tensor` that `mma.sync` reaches.
    """

    chip: str
    processors: int
    clock: float
    bandwidth: float
    tensor: float
    shared: int
    shared_block: int
    mma: float


ARCHITECTURES = {
    # 99 KiB a block: consumer chips of sm_86, sm_89 and sm_120 take these tiles too.
    80: Architecture("A100 SXM4 80 GB", 108, 1.41e9, 2.04e12, 312e12, 164 << 10, 99 << 10, 1.0),
    90: Architecture("H100 SXM5 80 GB", 132, 1.755e9, 3.35e12, 989.4e12, 228 << 10, 227 << 10, 0.62),
    100: Architecture("B200", 148, 1.85e9, 8.0e12, 2250e12, 228 << 10, 227 << 10, 0.4),
}
"""Compute capability -> what it stands for. `mma` and all of B200 are rough."""


def chip_of(capability: tuple[int, int]) -> Architecture:
    """The entry for a GPU: that of its architecture, or the nearest one before it."""
    return ARCHITECTURES[max(target for target in ARCHITECTURES if target <= 10 * capability[0] + capability[1])]


_REGISTERS = 65536
_PRODUCTS = {"attention_forward": 2, "attention_grad_query": 3, "attention_grad_key": 4}
"""Products of tiles for every block of scores."""
_ELEMENT_SLOTS = 8
"""Instructions of ordinary units for every score: scaling, maximum, exponential, sum, rounding, mask."""
_FIXED_CYCLES = 100
"""What a block of scores costs whatever its size: barriers, addresses."""
_LANES = 128
"""Ordinary float32 lanes of a multiprocessor."""
_L2_SHARE = 2.2
"""The second-level cache gives about this many times the memory's bandwidth."""


def ordinary_rate(chip: Architecture) -> float:
    """Instructions of ordinary units a second."""
    return chip.processors * _LANES * chip.clock


def blocks_resident(warps: int, row: Mapping[str, Any], chip: Architecture) -> int:
    """How many blocks a multiprocessor holds at once, from a kernel table's row."""
    by_registers = _REGISTERS // (-(-row["registers"] // 8) * 8 * 32 * warps)
    by_shared = chip.shared // (row["shared"] + 1024)
    return max(0, min(by_registers, by_shared, 64 // warps))


def attention_share(kernel: str, dim: int, tile: tuple[int, ...], row: Mapping[str, Any], chip: Architecture) -> float:
    """Estimated share of the tensor cores' limit on long rows: of the times that tensor cores, ordinary units and loads take
    for a block of scores, the longest, or their sum where only one block is resident to fill the gaps."""
    rows, keys, warps, stages = tile
    resident = blocks_resident(warps, row, chip)
    if not resident:
        return -1.0
    unit = {"mma": chip.mma, "none": chip.processors * _LANES * 2 * chip.clock / chip.tensor}.get(
        row["tensor_core"], 1.0
    )
    tensor = _PRODUCTS[kernel] * 2 * rows * keys * dim / (chip.tensor / chip.processors)
    ordinary = (rows * keys * _ELEMENT_SLOTS / _LANES + _FIXED_CYCLES) / chip.clock
    moved = 2 * 2 * dim * (rows if kernel == "attention_grad_key" else keys)
    loads = moved * chip.processors / (chip.bandwidth * _L2_SHARE)
    times = (tensor / unit, ordinary, loads)
    # Two groups of warps, or two blocks, take turns; one stage cannot load ahead.
    overlap = min(1.0, 0.5 * (resident * warps // 4 - 1) * (1 if stages > 1 else 0.5))
    return tensor / (overlap * max(times) + (1 - overlap) * sum(times))

"""What GPUs can do at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Vendor figures of one chip of an architecture.

    Attributes:
        chip: Which.
        bandwidth: Of its memory, bytes a second.
        tensor: Dense bfloat16 FLOPs a second of its tensor cores.
    """

    chip: str
    bandwidth: float
    tensor: float


ARCHITECTURES = {
    80: Architecture("A100 SXM4 80 GB", 2.04e12, 312e12),
    90: Architecture("H100 SXM5 80 GB", 3.35e12, 989.4e12),
    100: Architecture("B200", 8.0e12, 2250e12),
}
"""Compute capability -> what it stands for. B200 is rough."""


def chip_of(capability: tuple[int, int]) -> Architecture:
    """The entry for a GPU: that of its architecture, or the nearest one before it."""
    return ARCHITECTURES[max(target for target in ARCHITECTURES if target <= 10 * capability[0] + capability[1])]

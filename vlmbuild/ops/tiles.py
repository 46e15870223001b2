"""Which tile a kernel takes on which GPU: measured on the chip, or estimated for its architecture.

`tiles.json` holds both: {chip or architecture: {kernel: {size: [sides..., warps, stages]}}}. Entries of architectures are
estimated from what compilers say of registers and shared memory; none was timed. Entries under a chip's name go before its
architecture's. There are none so far.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vlmbuild.ops.triton_util import INTERPRET

FILE = Path(__file__).parent / "tiles.json"
SIDES: dict[str, tuple[str, ...]] = {
    "attention_forward": ("ROWS", "KEYS"),
    "attention_grad_query": ("ROWS", "KEYS"),
    "attention_grad_key": ("ROWS", "KEYS"),
    "attention_decode": ("KEYS",),
}
"""Kernel -> what its tile's sides are called."""


@cache
def known_tiles() -> dict[str, dict[str, dict[str, list[int]]]]:
    """The file's content, read once."""
    table: dict[str, dict[str, dict[str, list[int]]]] = json.loads(FILE.read_text(encoding="utf-8"))
    return table


def architecture(target: int) -> str:
    """The architecture whose tiles a GPU takes: its own, or the nearest one before it that has no more shared memory."""
    return "sm_90" if target == 90 else "sm_100" if 100 <= target < 120 else "sm_80"


@cache
def tile_of(kernel: str, size: int, dtype: torch.dtype, target: int) -> dict[str, Any]:
    """The tile for problems of a size (a head dimension, say): sides, `num_warps` and `num_stages`.

    Args:
        kernel: A key of `SIDES`.
        size: Takes the entry of the next larger size that has one, or the largest.
        dtype: Of what is multiplied; float32 has entries of its own.
        target: Compute capability, 90 for sm_90.
    """
    sides = SIDES[kernel]
    if INTERPRET:
        return dict.fromkeys(sides, 16) | {"num_warps": 4, "num_stages": 1}  # small tests have many blocks
    name = f"{kernel} float32" if dtype == torch.float32 else kernel
    entries: dict[str, list[int]] = {}
    for chip in (*_chip(target), architecture(target)):
        entries = entries or known_tiles().get(chip, {}).get(name, {})
    sizes = sorted(map(int, entries))
    chosen = entries[str(next((known for known in sizes if known >= size), sizes[-1]))]
    return dict(zip((*sides, "num_warps", "num_stages"), chosen, strict=True))


def _chip(target: int) -> tuple[str, ...]:
    """The name of the GPU that is here, if it is of that capability."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != divmod(target, 10):
        return ()
    return (torch.cuda.get_device_name(),)

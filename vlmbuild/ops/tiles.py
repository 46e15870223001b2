"""Tiles of Triton kernels for each GPU architecture, and which kernels a benchmark has measured.

`tiles.json` holds two tables:

    {"tiles": {architecture: {kernel: {size: [BLOCK_M, BLOCK_N, warps, stages]}}},
     "measured": {"sm_90": {kernel: {"device": name of the GPU, "right": true, "ratio": 0.87}}}}

Tiles are estimated from the registers and shared memory that compilers report; an estimate lets a kernel run and says nothing
of its speed. A row of "measured" exists only for a kernel that ran on that chip: `right` says that its results agreed with the
reference, `ratio` is its time over that of torch's kernels, the largest over the benchmark's sizes. `tests/gpu/measure.sh`
writes it. Where no operator is chosen by name, our kernels run only if `is_measured`, except for masks that only Triton
takes.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

FILE = Path(__file__).parent / "tiles.json"
Measured = Literal["attention", "rope", "cross_entropy"]
"""Measured operators, each with its forward and backward."""


@cache
def tables() -> dict[str, dict[str, Any]]:
    """Read the file; cached."""
    content: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def is_measured(kernel: Measured, capability: int) -> bool:
    """Return whether a benchmark on this chip found a kernel right and no slower than torch's; 90 is sm_90."""
    row = tables()["measured"].get(f"sm_{capability}", {}).get(kernel, {})
    return row.get("right") is True and row["ratio"] <= 1.0


def runs_by_default(kernel: Measured, tensor: torch.Tensor) -> bool:
    """Return whether our kernel is the default for a tensor: on a GPU where it is measured, with triton installed."""
    if not tensor.is_cuda or tensor.dtype == torch.float64 or not has_triton() or not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return is_measured(kernel, 10 * major + minor)


@cache
def has_triton() -> bool:
    """Return whether triton is installed (it is Linux only)."""
    return find_spec("triton") is not None


def architecture(target: int) -> str:
    """Return the architecture whose tiles fit a GPU: its own, or the nearest one before it that has no more shared memory."""
    return "sm_90" if target == 90 else "sm_100" if 100 <= target < 120 else "sm_80"


@cache
def tile_of(kernel: str, size: int, dtype: torch.dtype, target: int) -> dict[str, int]:
    """Return the tile for problems of a size: BLOCK_M, BLOCK_N, `num_warps` and `num_stages`.

    Args:
        kernel: Name in the table.
        size: Head dimension; takes the entry of the next larger size that has one, or the largest.
        dtype: Dtype of the operands; float32 has entries of its own.
        target: Compute capability, 90 for sm_90.
    """
    from vlmbuild.ops.triton_util import INTERPRET

    if INTERPRET:
        chosen = [16, 16, 4, 1]  # small tests have many blocks
    else:
        name = f"{kernel} float32" if dtype == torch.float32 else kernel
        entries = tables()["tiles"][architecture(target)][name]
        sizes = sorted(map(int, entries))
        chosen = entries[str(next((known for known in sizes if known >= size), sizes[-1]))]
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), chosen, strict=True))

"""Tiles of Triton kernels for each GPU, and which kernels a benchmark has measured on it.

`tiles.json` holds two tables:

    {"tiles": {chip or architecture: {kernel: {size: [sides..., warps, stages]}}},
     "measured": {"sm_90": {kernel: {"device": name of the GPU, "right": true, "ratio": 0.87}}}}

Tiles of architectures are estimated from the registers and shared memory that compilers report; entries under a chip's name
precede its architecture's. An estimate lets a kernel run and says nothing of its speed. A row of "measured" exists only for a
kernel that ran on that chip: `right` says that its results agreed with the reference, `ratio` is its time over that of
torch's kernels, the largest over the benchmark's sizes. A benchmark writes it with `write_measurement`. Where no operator is
chosen by name, our kernels run only if `is_measured`, except for groups of keys, which only Triton takes. There
are no rows so far.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vlmbuild.errors import UsageError

FILE = Path(__file__).parent / "tiles.json"
SIDES: dict[str, tuple[str, ...]] = {
    "attention_forward": ("BLOCK_M", "BLOCK_N"),
    "attention_grad_query": ("BLOCK_M", "BLOCK_N"),
    "attention_grad_key": ("BLOCK_M", "BLOCK_N"),
    "attention_decode": ("BLOCK_N",),
}
"""Kernel -> the names of its tile's sides."""

MEASURED = ("attention", "rope", "cross_entropy")
"""Measured operators, each with its forward and backward."""


@cache
def tables(file: Path) -> dict[str, dict[str, Any]]:
    """Read the file; cached."""
    content: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return content


def known_tiles() -> dict[str, dict[str, dict[str, list[int]]]]:
    """Return the tiles of every chip and architecture."""
    return tables(FILE)["tiles"]


def is_measured(kernel: str, capability: int) -> bool:
    """Return whether a benchmark on this chip found a kernel right and no slower than torch's.

    Args:
        kernel: One of `MEASURED`.
        capability: Compute capability, 90 for sm_90.
    """
    row = tables(FILE)["measured"].get(f"sm_{capability}", {}).get(_check(kernel), {})
    return row.get("right") is True and row["ratio"] <= 1.0


def runs_by_default(kernel: str, tensor: torch.Tensor) -> bool:
    """Return whether our kernel is the default for a tensor: on a GPU where it is measured, with triton installed."""
    if not tensor.is_cuda or tensor.dtype == torch.float64 or not has_triton() or not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return is_measured(kernel, 10 * major + minor)


@cache
def has_triton() -> bool:
    """Return whether triton is installed (it is Linux only)."""
    return find_spec("triton") is not None


def write_measurement(
    kernel: str, capability: int, *, right: bool, ratio: float, device: str, file: Path | None = None
) -> None:
    """Write the row of a kernel on a chip, from a benchmark that ran on it.

    Args:
        kernel: One of `MEASURED`.
        capability: Compute capability of the chip, 90 for sm_90.
        right: True if all results agreed with the reference.
        ratio: Time over that of torch's kernels, the largest over the benchmark's sizes.
        device: Name of the GPU.
        file: Instead of the package's own `tiles.json`.

    Raises:
        UsageError: The kernel is unknown, or the ratio is not a positive number.
    """
    if not ratio > 0:  # also for NaN
        raise UsageError(f"ratio of {kernel}: {ratio} is not a positive number. Pass our time over torch's.")
    file = FILE if file is None else file
    content = json.loads(file.read_text(encoding="utf-8"))
    row = {"device": device, "right": right, "ratio": round(ratio, 3)}
    content["measured"].setdefault(f"sm_{capability}", {})[_check(kernel)] = row
    file.write_text(_text(content), encoding="utf-8")
    tables.cache_clear()


def _check(kernel: str) -> str:
    if kernel not in MEASURED:
        raise UsageError(f"kernel {kernel!r} is not measured. Pass one of {', '.join(MEASURED)}.")
    return kernel


def _text(content: dict[str, dict[str, Any]]) -> str:
    """Format the file with one line a kernel."""
    parts = []
    for table, chips in content.items():
        blocks = []
        for chip, kernels in chips.items():
            lines = ",\n".join(f"      {json.dumps(kernel)}: {json.dumps(row)}" for kernel, row in kernels.items())
            blocks.append(f"    {json.dumps(chip)}: {{\n{lines}\n    }}")
        parts.append(f"  {json.dumps(table)}: {{" + ("\n" + ",\n".join(blocks) + "\n  }" if blocks else "}"))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def architecture(target: int) -> str:
    """Return the architecture whose tiles fit a GPU: its own, or the nearest one before it that has no more shared memory."""
    return "sm_90" if target == 90 else "sm_100" if 100 <= target < 120 else "sm_80"


@cache
def tile_of(kernel: str, size: int, dtype: torch.dtype, target: int) -> dict[str, Any]:
    """Return the tile for problems of a size (a head dimension, say): sides, `num_warps` and `num_stages`.

    Args:
        kernel: A key of `SIDES`.
        size: Takes the entry of the next larger size that has one, or the largest.
        dtype: Dtype of the operands; float32 has entries of its own.
        target: Compute capability, 90 for sm_90.
    """
    sides = SIDES[kernel]
    from vlmbuild.ops.triton_util import INTERPRET

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
    """Return the name of the current GPU, if it has that capability."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != divmod(target, 10):
        return ()
    return (torch.cuda.get_device_name(),)

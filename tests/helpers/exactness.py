"""Inputs of kernels' tests, and how near a result must be to one in float64."""

from __future__ import annotations

import os

import torch

SEED = int(os.environ.get("KERNEL_SEED", torch.Generator().seed() % 2**31))
"""Another one each time; a failure names it, and `KERNEL_SEED` brings its inputs back."""
GENERATOR = torch.Generator().manual_seed(SEED)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates to bfloat16 and cannot multiply it, so half precision stands for 16 bits there.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)
LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative error: sums of float32 in another order, and rounding of inputs to products and of the result to 16 bits."""


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR).to(DEVICE, dtype)


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the exact result."""
    assert actual.shape == exact.shape
    actual, exact = actual.detach().double(), exact.detach().double()
    difference = (actual - exact).norm()
    return float(difference if exact.eq(0).all() else difference / exact.norm())


def near(actual: torch.Tensor, exact: torch.Tensor) -> None:
    found = error(actual, exact)
    assert found <= LIMIT[actual.dtype], f"relative error {found:.2e}; KERNEL_SEED={SEED}"


def lookahead(rows: int, *blocks: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """The keys that rows in blocks [first, last) see after their own: int32 `[B, rows]`, from the blocks of each sample."""
    ahead = torch.zeros(len(blocks), rows, dtype=torch.int32)
    for sample, row in zip(blocks, ahead, strict=True):
        for first, end in sample:
            last = min(end, rows)
            row[first:last] = torch.arange(max(0, last - first)).flip(0)
    return ahead

"""Choose tiles of kernels for GPUs that are not here: compile the candidates, drop what spills, estimate the rest.

python -m tests.bench.kernel_tiles        # rewrites the architectures' entries of vlmbuild/ops/tiles.json, half an hour

Nothing is timed; on a GPU, `kernel_tune` adds entries of that chip, by time. A kernel that is new needs some entry there first,
to be launched at all.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from tests.bench.kernel_cases import MODES, attention_launch, linear_8bit_launch, linear_launch
from tests.bench.kernel_limits import ARCHITECTURES, Architecture, attention_share
from vlmbuild.locks.kernel_table import TARGETS, compile_launch
from vlmbuild.ops.tiles import FILE
from vlmbuild.util.cpu import available_cores

DIMS = (64, 80, 96, 128)
CANDIDATES = {
    "attention_forward": [
        (128, 128, 8, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 2),
        (64, 32, 4, 3),
    ],
    "attention_grad_query": [
        (128, 64, 8, 2),
        (64, 64, 4, 2),
        (128, 32, 8, 2),
        (128, 32, 8, 3),
        (64, 32, 4, 2),
        (64, 32, 4, 3),
    ],
    "attention_grad_key": [
        (64, 128, 8, 2),
        (32, 128, 8, 2),
        (64, 64, 4, 2),
        (32, 64, 4, 2),
        (32, 64, 4, 3),
        (32, 32, 4, 2),
    ],
}
"""Kernel -> (sides, warps, stages)."""

LINEAR = {
    ("linear_4bit_vector", 1): [(4, 1024, 4, 1)],
    ("linear_4bit", 16): [(64, 64, 4, 3), (64, 64, 4, 2)],
    ("linear_4bit", 64): [(128, 64, 8, 2), (64, 64, 8, 2)],
    ("linear_4bit", 128): [(128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 3)],
    ("linear_4bit_grad", 16): [(64, 64, 4, 2)],
    ("linear_4bit_grad", 64): [(64, 64, 4, 2)],
    ("linear_4bit_grad", 128): [(64, 128, 8, 2), (64, 64, 8, 2)],
    ("linear_8bit", 16): [(64, 128, 4, 4), (64, 128, 4, 3)],
    ("linear_8bit", 64): [(128, 128, 8, 3), (64, 128, 4, 3)],
    ("linear_8bit", 128): [(128, 128, 8, 3), (128, 64, 8, 4)],
    ("linear_8bit_grad", 16): [(64, 64, 4, 3), (64, 64, 4, 2)],
    ("linear_8bit_grad", 64): [(64, 128, 8, 3), (64, 64, 4, 2)],
    ("linear_8bit_grad", 128): [(64, 128, 8, 3), (64, 128, 8, 2)],
}
"""(Kernel, rows) -> the same, best first by what moves least: the first that spills nothing is taken."""

FLOAT32 = [(32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)]
"""For float32, which tensor cores do not multiply exactly."""


@dataclass(frozen=True)
class Case:
    """A tile to be found: of a kernel, for a head dimension, on an architecture."""

    kernel: str
    dim: int
    dtype: torch.dtype
    target: int

    def share(self, tile: tuple[int, ...], mode: str) -> float:
        """The estimated share of the limit; below zero where the tile cannot be used."""
        launch = attention_launch(self.kernel, self.dim, mode, self.dtype, self.target, tile)
        try:
            row = compile_launch(launch, self.target)
        except Exception as error:  # a compiler's failure is one more reason not to take a tile
            print(f"{self} {tile} {mode}: {type(error).__name__}", file=sys.stderr)
            return -1.0
        chip: Architecture = ARCHITECTURES[self.target]
        if row["spilled"] or row["shared"] > chip.shared_block:
            return -1.0
        return attention_share(self.kernel, self.dim, tile, row, chip)

    def choose(self) -> tuple[int, ...]:
        """The best candidate that spills in no mode."""
        candidates = FLOAT32 if self.dtype == torch.float32 else CANDIDATES[self.kernel]
        first = {tile: self.share(tile, "groups") for tile in candidates}
        for tile in sorted(first, key=lambda tile: -first[tile]):
            if first[tile] > 0 and all(self.share(tile, mode) > 0 for mode in MODES):
                print(f"{self.kernel} {self.dim} {self.dtype} sm_{self.target}: {tile} {first[tile]:.2f}", flush=True)
                return tile
        raise RuntimeError(f"no candidate fits {self}")


def choose_linear(kernel: str, rows: int, target: int) -> tuple[int, ...]:
    """The first candidate that spills nothing and fits."""
    for tile in LINEAR[kernel, rows]:
        launch = (linear_8bit_launch if "8bit" in kernel else linear_launch)(kernel, rows, target, tile)
        row = compile_launch(launch, target)
        if not row["spilled"] and row["shared"] <= ARCHITECTURES[target].shared_block:
            print(f"{kernel} {rows} sm_{target}: {tile}", flush=True)
            return tile
    raise RuntimeError(f"no candidate fits {kernel} {rows} sm_{target}")


def main() -> None:
    table = json.loads(FILE.read_text())
    cases = [
        Case(kernel, dim, dtype, target)
        for target in TARGETS
        for dtype in (torch.bfloat16, torch.float32)
        for kernel in CANDIDATES
        for dim in DIMS
    ]
    with ThreadPoolExecutor(available_cores()) as pool:
        for case, tile in zip(cases, pool.map(Case.choose, cases), strict=True):
            name = f"{case.kernel} float32" if case.dtype == torch.float32 else case.kernel
            table[f"sm_{case.target}"].setdefault(name, {})[str(case.dim)] = tile
    for target in TARGETS:
        for kernel, rows in LINEAR:
            table[f"sm_{target}"].setdefault(kernel, {})[str(rows)] = choose_linear(kernel, rows, target)
    FILE.write_text(table_text(table))


def table_text(table: dict[str, dict[str, dict[str, list[int]]]]) -> str:
    """JSON with a kernel a line."""
    chips = []
    for chip, kernels in table.items():
        lines = [f"    {json.dumps(name)}: {json.dumps(sizes)}" for name, sizes in kernels.items()]
        chips.append(f"  {json.dumps(chip)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(chips) + "\n}\n"


if __name__ == "__main__":
    main()

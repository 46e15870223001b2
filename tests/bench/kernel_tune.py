"""Choose tiles of kernels for the GPU that is here, by time, and write them beside the estimated ones.

python -m tests.bench.kernel_tune        # adds or rewrites this chip's entries of vlmbuild/ops/tiles.json; commit the file

Candidates that spill or do not fit are dropped before they are timed, and of attention's those that are estimated at less than
half of the best. Entries of a chip go before those of its architecture wherever vlmbuild runs on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from tests.bench import kernel_linear_sides as linear
from tests.bench import kernel_sides as sides
from tests.bench.kernel_cases import (
    MODES,
    attention_launch,
    decode_launch,
    linear_8bit_launch,
    linear_launch,
    with_tile,
)
from tests.bench.kernel_limits import Architecture, attention_share, chip_of
from tests.bench.kernel_sides import Run, Setting
from tests.bench.kernel_tiles import CANDIDATES, DIMS, LINEAR, table_text
from vlmbuild.locks.kernel_table import compile_launch
from vlmbuild.ops import tiles
from vlmbuild.ops.triton_util import Launch
from vlmbuild.util.cpu import available_cores

Tile = tuple[int, ...]
DECODE: list[Tile] = [(64, 4, 3), (32, 4, 3), (128, 4, 2), (64, 4, 2), (128, 8, 2)]
_LEAST_SHARE = 0.5


def wanted() -> Iterator[tuple[str, int, list[Tile]]]:
    """Kernel, size and candidates of every entry."""
    for kernel, candidates in CANDIDATES.items():
        yield from ((kernel, dim, candidates) for dim in DIMS)
    yield from (("attention_decode", dim, DECODE) for dim in DIMS)
    yield from ((kernel, rows, candidates) for (kernel, rows), candidates in LINEAR.items())


def launches_of(kernel: str, size: int, target: int, tile: Tile) -> list[Launch]:
    """To be compiled only; of attention's kernels one a kind of mask."""
    if kernel in CANDIDATES:
        return [attention_launch(kernel, size, mode, torch.bfloat16, target, tile) for mode in reversed(MODES)]
    if kernel == "attention_decode":
        return [with_tile(decode_launch(size, target), kernel, tile)]
    return [(linear_8bit_launch if "8bit" in kernel else linear_launch)(kernel, size, target, tile)]


def call_of(kernel: str, size: int) -> Run:
    """What is timed: the operator's own call on a large problem of this size."""
    setting = Setting("cuda", torch.bfloat16)
    if kernel in CANDIDATES:
        part = "forward" if kernel == "attention_forward" else "backward"
        return sides.attention(setting, 8192, (16, 4), size, True, 2)[part].run
    if kernel == "attention_decode":
        return sides.one_row(setting, 16384, (28, 4), size).run
    layer = linear.linear_8bit if "8bit" in kernel else linear.linear_4bit
    return layer(setting, size, 8960, 1536)["input gradient" if kernel.endswith("grad") else "forward"].run


def fitting(
    kernel: str,
    size: int,
    candidates: Iterable[Tile],
    target: int,
    chip: Architecture,
    compiled: Callable[[Launch, int], Any],
) -> list[Tile]:
    """The candidates that are worth timing."""

    def share(tile: Tile) -> float:
        for launch in launches_of(kernel, size, target, tile):
            row = compiled(launch, target)
            if row["spilled"] or row["shared"] > chip.shared_block:
                return -1.0
        return attention_share(kernel, size, tile, row, chip) if kernel in CANDIDATES else 1.0

    with ThreadPoolExecutor(available_cores()) as pool:
        shares = dict(zip(candidates, pool.map(share, candidates), strict=True))
    return [tile for tile in candidates if shares[tile] >= _LEAST_SHARE * max(0.0, *shares.values())]


def fastest(kernel: str, size: int, candidates: Iterable[Tile], chip: str, time: Callable[[], float]) -> Tile:
    """The candidate that takes least time; it stays in the table that launches look into."""
    entry = tiles.known_tiles().setdefault(chip, {}).setdefault(kernel, {})

    def timed(tile: Tile) -> float:
        entry[str(size)] = list(tile)
        tiles.tile_of.cache_clear()
        return time()

    best = min(candidates, key=timed)
    entry[str(size)] = list(best)
    tiles.tile_of.cache_clear()
    return best


def main() -> None:
    from triton.testing import do_bench

    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    target, chip = 10 * capability[0] + capability[1], chip_of(capability)
    for kernel, size, candidates in wanted():
        left = fitting(kernel, size, candidates, target, chip, compile_launch)
        if not left:
            print(f"{kernel} {size}: no candidate fits; the architecture's entry stays")
            continue
        tile = fastest(kernel, size, left, name, partial(do_bench, call_of(kernel, size), return_mode="median"))
        print(f"{kernel} {size}: {tile} of {len(left)}", flush=True)
    table = json.loads(tiles.FILE.read_text())
    tiles.FILE.write_text(table_text(table | {name: tiles.known_tiles()[name]}))


if __name__ == "__main__":
    main()

"""The Triton kernels, all in one call: times on a GPU, or what compilers make of them where there is none.

    python -m tests.bench.kernels [--output artifacts/benchmarks/kernels.json] [--only attention]

On a GPU: median and 20 % and 80 % quantiles of every kernel and its peers on the same inputs, the share of the chip's limit, and
the distance of results; a kernel that disagrees is an error. Without one: registers, spills, shared memory, resident blocks and
tensor cores per architecture, compiled ahead of time, and for attention an estimated share of the limit. Nothing is timed then.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tests.bench.kernel_cases import resource_cases
from tests.bench.kernel_limits import ARCHITECTURES, Architecture, attention_share, blocks_resident
from vlmbuild.cores import available_cores
from vlmbuild.locks.kernel_table import TARGETS, compile_launch

AGREEMENT = 2e-2
"""Relative distance of bfloat16 results of two ways to the same."""

Row = dict[str, Any]


def report() -> Iterator[Row]:
    """What is known without a GPU, a row for every case and architecture."""
    cases = [(case, target) for case in resource_cases() for target in TARGETS]
    with ThreadPoolExecutor(available_cores()) as pool:
        yield from pool.map(lambda task: _resources(*task), cases)


def _resources(case: Any, target: int) -> Row:
    launch, chip = case.launch(target), ARCHITECTURES[target]
    row = compile_launch(launch, target)
    row |= {"kernel": case.name, "target": f"sm_{target}"}
    row["resident"] = blocks_resident(launch.tile["num_warps"], row, chip)
    if case.attention is not None:
        sides = (*(launch.tile[side] for side in ("ROWS", "KEYS")), launch.tile["num_warps"], launch.tile["num_stages"])
        row["share"] = round(attention_share(*case.attention, sides, row, chip), 2)
    return row


def report_line(row: Row) -> str:
    share = f"{row['share']:6.0%}" if "share" in row else ""
    return (
        f"{row['kernel']:44} {row['target']:7} {row['tile']:34} {row['registers']:4} {row['spilled']:5} "
        f"{row['shared']:7} {row['resident']:4} {row['tensor_core']:8} {share}"
    )


def measure(only: str) -> Iterator[Row]:
    """Times on the GPU that is here."""
    from tests.bench.kernel_problems import problems

    chip = _chip()
    for problem in problems():
        if only in problem.name:
            limit = problem.limit(chip)
            distance = max(_distance(*pair) for pair in zip(_flat(problem.run()), _flat(problem.exact()), strict=True))
            if distance > AGREEMENT:
                raise SystemExit(f"{problem.name}: results differ by {distance:.1e} from the reference's")
            row: Row = {"kernel": problem.name, "distance": distance, "limit_ms": 1e3 * limit, **_time(problem.run)}
            row["share"] = row["limit_ms"] / row["median_ms"]
            row["peers"] = {name: _time(call) for name, call in problem.peers.items()}
            yield row


def measured_line(row: Row) -> str:
    peers = "  ".join(f"{name} {peer['median_ms'] / row['median_ms']:.2f}x" for name, peer in row["peers"].items())
    quantiles = f"({row['low_ms']:.3f}-{row['high_ms']:.3f})"
    return f"{row['kernel']:64} {row['median_ms']:9.3f} ms {quantiles:17} {row['share']:5.0%} of the limit  {peers}"


def _time(call: Any) -> Row:
    """Median and 20 % and 80 % quantiles, milliseconds; warmed up, with an empty second-level cache before each call."""
    from triton.testing import do_bench

    names = ("median_ms", "low_ms", "high_ms")
    return dict(zip(names, do_bench(call, warmup=25, rep=100, quantiles=(0.5, 0.2, 0.8)), strict=True))


def _chip() -> Architecture:
    major, minor = torch.cuda.get_device_capability()
    return ARCHITECTURES[max(target for target in ARCHITECTURES if target <= 10 * major + minor)]


def _flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [item for item in result if item is not None]


def _distance(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def _record(rows: list[Row]) -> Row:
    versions = {}
    for name in ("torch", "triton", "bitsandbytes", "transformers", "liger_kernel"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    cuda = torch.cuda.is_available()
    return {
        "command": "python -m tests.bench.kernels --output artifacts/benchmarks/kernels.json",
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else "none: compiled ahead of time, nothing is timed",
        "versions": versions | ({"cuda": torch.version.cuda} if cuda else {}),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="", help="measure what has this in its name")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda:
        print(f"{'no GPU: resources':44} {'target':7} {'tile':34} regs spill  shared  res. cores    share (estimated)")
    rows = []
    for row in measure(arguments.only) if cuda else report():
        rows.append(row)
        print(measured_line(row) if cuda else report_line(row), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(_record(rows), indent=1) + "\n")
    if any(row.get("spilled") for row in rows):
        sys.exit("A kernel spills registers.")


if __name__ == "__main__":
    main()

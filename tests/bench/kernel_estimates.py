"""What is known of the kernels without a GPU: what compilers make of them, and how long a problem takes by bytes and FLOPs.

An estimate is the longest of three times: of tensor cores, of memory, and of ordinary units, each at the vendor's figure, after
that of memory in a launch before, if there is one. Attention's tensor cores are taken at the share that registers and shared
memory of the compiled kernel allow (`kernel_limits`). It knows nothing of launches, caches and uneven work, and is no
measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.bench.kernel_cases import Case, resource_cases
from tests.bench.kernel_limits import ARCHITECTURES, Architecture, attention_share, blocks_resident, ordinary_rate
from tests.bench.kernel_problems import Problem, problems
from vlmbuild.locks.kernel_table import TARGETS, compile_launch
from vlmbuild.util.cpu import available_cores

Row = dict[str, Any]
_BACKWARD = {"attention_grad_query": 1.5, "attention_grad_key": 2.0}
"""Kernel -> FLOPs over the forward's; scores are made again in both."""


def resources() -> Iterator[Row]:
    """A row for every kernel and architecture."""
    cases = [(case, target) for case in resource_cases() for target in TARGETS]
    with ThreadPoolExecutor(available_cores()) as pool:
        yield from pool.map(lambda task: _resources(*task), cases)


def _resources(case: Case, target: int) -> Row:
    launch, chip = case.launch(target), ARCHITECTURES[target]
    row = {"kernel": case.name, "target": f"sm_{target}", **compile_launch(launch, target)}
    row["resident"] = blocks_resident(launch.tile["num_warps"], row, chip)
    if case.attention is not None:
        sides = (*(launch.tile[side] for side in ("ROWS", "KEYS")), launch.tile["num_warps"], launch.tile["num_stages"])
        row["share"] = round(attention_share(*case.attention, sides, row, chip), 2)
    return row


def resource_line(row: Row) -> str:
    share = f"{row['share']:6.0%}" if "share" in row else ""
    return (
        f"{row['kernel']:44} {row['target']:7} {row['tile']:50} {row['registers']:4} {row['spilled']:5} "
        f"{row['shared']:7} {row['resident']:4} {row['tensor_core']:8} {share}"
    )


def estimates(known: Sequence[Row]) -> Iterator[Row]:
    """A row for every problem, with a chip of each architecture; `known` are `resources`."""
    shares = {(row["kernel"], row["target"]): row["share"] for row in known if "share" in row}
    for problem in problems():
        row: Row = {"kernel": problem.kernel, "sizes": problem.sizes, "flops": problem.flops, "bytes": problem.moved}
        yield row | {f"sm_{target}": _estimate(problem, target, shares) for target in TARGETS}


def _estimate(problem: Problem, target: int, shares: Mapping[tuple[str, str], float]) -> Row:
    chip = ARCHITECTURES[target]
    limit, bound = problem.limit(chip)
    tensor = _tensor_seconds(problem, chip, f"sm_{target}", shares)
    times = {
        "tensor cores": tensor,
        "memory": problem.moved / chip.bandwidth,
        "ordinary units": problem.ordinary / ordinary_rate(chip),
    }
    slowest = max(times, key=lambda unit: times[unit])
    return {
        "limit_ms": _rounded(1e3 * limit),
        "limited_by": bound,
        "estimated_ms": _rounded(1e3 * (times[slowest] + problem.before / chip.bandwidth)),
        "slowest": slowest,
    }


def _tensor_seconds(
    problem: Problem, chip: Architecture, target: str, shares: Mapping[tuple[str, str], float]
) -> float:
    """Of attention's kernels at their shares; backward, scores are made twice again, for queries and for keys."""
    part = problem.kernel.removeprefix("attention ")
    if part not in ("forward", "backward"):
        return problem.flops / chip.tensor
    factors = {"attention_forward": 1.0} if part == "forward" else _BACKWARD
    forward = problem.flops / (1.0 if part == "forward" else 2.5)
    dim = problem.sizes["dim"]
    return sum(
        factor * forward / (chip.tensor * shares[f"{kernel} {dim} packed causal", target])
        for kernel, factor in factors.items()
    )


def estimate_line(row: Row) -> str:
    name = f"{row['kernel']}: " + ", ".join(f"{key} {value}" for key, value in row["sizes"].items())
    chips = "  ".join(
        f"{row[f'sm_{target}']['estimated_ms']:8.4f} ({row[f'sm_{target}']['limit_ms']:.4f})" for target in TARGETS
    )
    return f"{name:86} {chips}  {row['sm_90']['slowest']}"


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")

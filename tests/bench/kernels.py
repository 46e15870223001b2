"""Time the Triton kernels and their peers on a GPU.

    python -m tests.bench.kernels --smoke                                            # first: every call once, on small sizes
    python -m tests.bench.kernels --output artifacts/benchmarks/kernels.json         # on a GPU

On a GPU: median and 20 % and 80 % quantiles of every kernel and its peers on the same inputs, the share of the chip's limit, peak
memory, host time of a call, the distance of results (a kernel that disagrees is an error), how often each kernel was compiled,
and which of the goals in `kernel_bars` hold.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

AGREEMENT = 2e-2
"""Relative distance of bfloat16 results of two ways to the same."""
_PACKAGES = ("torch", "triton", "bitsandbytes", "transformers", "liger_kernel")

Row = dict[str, Any]


def measure(only: str) -> Iterator[Row]:
    """Times on the GPU that is here."""
    import torch

    from tests.bench.kernel_limits import chip_of
    from tests.bench.kernel_problems import problems
    from tests.bench.kernel_sides import Setting
    from tests.bench.kernel_timing import timed

    chip = chip_of(torch.cuda.get_device_capability())
    for problem in problems():
        if only in problem.name:
            sides = problem.prepare(Setting("cuda", torch.bfloat16))
            distance = agreement(problem.name, sides)
            row: Row = {"kernel": problem.kernel, "name": problem.name, "sizes": problem.sizes, "flops": problem.flops}
            row |= {"bytes": problem.moved, "distance": distance, **timed(sides.run)}
            seconds, row["limited_by"] = problem.limit(chip)
            row["limit_ms"] = 1e3 * seconds
            row["share"] = row["limit_ms"] / row["median_ms"]
            row["peers"] = {name: _peer(timed, call) for name, call in sides.peers.items()}
            yield row


def agreement(name: str, sides: Any) -> float:
    """The distance of a kernel's results from the exact side's.

    Raises:
        SystemExit: It is too far.
    """
    found = max(_distance(*pair) for pair in zip(_flat(sides.run()), _flat(sides.exact()), strict=True))
    if not found <= AGREEMENT:  # NaN is no agreement
        raise SystemExit(f"{name}: results differ by {found:.1e} from the reference's")
    return found


def _peer(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # a peer that does not run here is said to be missing, and stops nothing
        return {"missing": f"{type(error).__name__}: {str(error)[:200]}"}


def smoke() -> Iterator[Row]:
    """Every kernel and peer once on small sizes, held against the exact side; in Triton's interpreter where there is no GPU."""
    import torch

    from tests.bench.kernel_problems import small_problems
    from tests.bench.kernel_sides import Setting, Sides

    cuda = torch.cuda.is_available()
    setting = Setting("cuda", torch.bfloat16) if cuda else Setting("cpu", torch.float16)
    for problem in small_problems():
        sides = problem.prepare(setting)
        row = {"name": problem.name, "distance": agreement(problem.name, sides)}
        peers = {name: Sides(call, sides.exact) for name, call in sides.peers.items()}
        yield row | {"peers": {name: _peer(agreement, f"{problem.name}, {name}", peer) for name, peer in peers.items()}}


def smoke_line(row: Row) -> str:
    peers = ", ".join(
        f"{name} {found['missing']}" if isinstance(found, dict) else f"{name} {found:.0e}"
        for name, found in row["peers"].items()
    )
    return f"{row['name']:86} {row['distance']:.0e}  {peers}"


def measured_line(row: Row) -> str:
    peers = "  ".join(
        f"{name} {peer['median_ms'] / row['median_ms']:.2f}x" if "median_ms" in peer else f"{name} missing"
        for name, peer in row["peers"].items()
    )
    quantiles = f"({row['low_ms']:.3f}-{row['high_ms']:.3f})"
    return (
        f"{row['name']:86} {row['median_ms']:9.3f} ms {quantiles:17} {row['share']:5.0%} of the limit  "
        f"host {row['host_us']:.0f} us  {peers}"
    )


def _flat(result: Any) -> list[Any]:
    return [item for item in result if item is not None] if isinstance(result, list | tuple) else [result]


def _distance(actual: Any, exact: Any) -> float:
    actual, exact = actual.detach().double(), exact.detach().double()
    return float((actual - exact).norm() / exact.norm())


def record(command: str, device: str, **content: Any) -> Row:
    """What is written: how it was made, and the rows."""
    import torch

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "device": device,
        "versions": versions | ({"cuda": torch.version.cuda} if torch.cuda.is_available() else {}),
        **content,
    }


def _measure(only: str) -> Row:
    import torch

    from tests.bench.kernel_bars import judged
    from tests.bench.kernel_timing import counted_compilations

    rows = []
    with counted_compilations() as compilations:
        for row in measure(only):
            rows.append(row)
            print(measured_line(row), flush=True)
    bars = judged(rows)
    for bar in bars:
        held = {True: "held", False: "missed", None: "unknown"}[bar["held"]]
        print(f"{held:8} {bar['bar']}: {bar['margin'] or 0:.2f} ({bar['worst']})")
    command = "python -m tests.bench.kernels --output artifacts/benchmarks/kernels.json"
    return record(command, torch.cuda.get_device_name(), rows=rows, bars=bars, compilations=dict(compilations))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="", help="measure what has this in its name")
    parser.add_argument("--smoke", action="store_true", help="run everything once, on small sizes")
    arguments = parser.parse_args()
    import torch

    cuda = torch.cuda.is_available()
    if arguments.smoke and (arguments.output or arguments.only):
        parser.error("--smoke runs everything and writes nothing: it goes alone.")
    if not cuda and not arguments.smoke:
        parser.error("Kernels are timed on a CUDA device, and there is none. Pass --smoke to run each of them once.")
    if arguments.smoke:
        if not cuda:
            os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        for row in smoke():
            print(smoke_line(row), flush=True)
        return
    found = _measure(arguments.only)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

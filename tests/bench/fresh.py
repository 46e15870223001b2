"""Measurements in fresh processes: run the sides in turn, take medians, compare with goals, and write the result."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
_CHUNK_BYTES = 1 << 24
Row = dict[str, Any]


def run_fresh(module: str, worker: str, threads: int, python: str | None = None, **options: Any) -> dict[str, Any]:
    """Run `python -m module worker OPTIONS` and return the JSON of its last line.

    Args:
        module: Defines the worker.
        worker: First argument.
        threads: OMP_NUM_THREADS of the process.
        python: Another interpreter, which has a peer's packages.
        **options: Second argument, as JSON.

    Returns:
        The worker's result with "process_seconds", imports and exit included.
    """
    command = [python or sys.executable, "-W", "ignore", "-m", module, worker, json.dumps(options, default=str)]
    # Passive waiting: threads that spin next to a busy neighbour make times of 10x, on either side.
    settings = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | settings
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{worker} {options} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result | {"process_seconds": seconds}


def interleave(
    cases: Mapping[str, Callable[[], Row]],
    rounds: int,
    show: Callable[[str, Row], str] = lambda case, row: f"{case}: {row}",
) -> dict[str, list[Row]]:
    """Run every case once a round, the cases in turn, so that a busy machine slows all of them.

    A case whose result is {"absent": reason} is not run again.
    """
    results: dict[str, list[Row]] = {case: [] for case in cases}
    for number in range(rounds):
        for case, measure in cases.items():
            if not (results[case] and "absent" in results[case][-1]):
                results[case].append(measure())
                print(f"{number + 1}/{rounds}  {show(case, results[case][-1])}", flush=True)
    return results


def medians(results: Sequence[Row], names: Sequence[str]) -> Row:
    """Median of each named figure over rounds; the reason alone where a side is absent."""
    if "absent" in results[-1]:
        return results[-1]
    return {name: median(result[name] for result in results) for name in names if name in results[0]}


def bar(name: str, goal: str, measured: float) -> Row:
    """Compare a figure with a goal such as ">= 1.5"."""
    relation, _, limit = goal.partition(" ")
    met = measured >= float(limit) if relation == ">=" else measured <= float(limit)
    shown = f"{measured:.2f}" if measured > 1e-2 or measured == 0 else f"{measured:.1e}"
    return {"name": name, "bar": goal, "measured": shown, "met": met}


def print_bars(bars: Sequence[Row]) -> None:
    """Print every goal, met or not."""
    width = max((len(one["name"]) for one in bars), default=0)
    for one in bars:
        print(f"{one['name']:{width}}  {one['bar']:>9}  {one['measured']:>9}  {'met' if one['met'] else 'NOT MET'}")


def write_report(file: Path | None, report: Row) -> None:
    """Write a report, with the load at its end."""
    report["load_average_after"] = list(os.getloadavg())
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n")


class PeakMemory:
    """Peak memory of this process: resident (with mapped files) as the kernel keeps it, anonymous as sampled."""

    def __init__(self, interval: float = 0.02) -> None:
        self._interval, self._anonymous = interval, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def figures(self) -> dict[str, int]:
        """Return both peaks in bytes."""
        return {"peak_resident": status_bytes("VmHWM"), "peak_anonymous": max(self._anonymous, status_bytes("RssAnon"))}

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self._anonymous = max(self._anonymous, status_bytes("RssAnon"))


def status_bytes(field: str) -> int:
    """Read a field of /proc/self/status; 0 where the kernel has none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def timed(function: Callable[[], object], warm_ups: int = 1, least: int = 3, seconds: float = 3.0) -> list[float]:
    """Measure the seconds of each call after the warm-ups, for at least `least` calls and `seconds` in all."""
    for _ in range(warm_ups):
        function()
    durations: list[float] = []
    while len(durations) < least or sum(durations) < seconds:
        started = time.perf_counter()
        function()
        durations.append(time.perf_counter() - started)
    return durations


def warm_cache(directory: Path) -> None:
    """Read every file once: the page cache cannot be emptied without privileges, so every measurement begins with it full."""
    for file in sorted(file for file in directory.rglob("*") if file.is_file()):
        with file.open("rb", buffering=0) as stream:
            while stream.read(_CHUNK_BYTES):
                pass


def machine() -> dict[str, Any]:
    """Describe the machine: versions, processor and load."""
    cpu = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "").split()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": cpu[0] if cpu else platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sha_ni") if flag in flags],
        "load_average": list(os.getloadavg()),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _DISTRIBUTIONS},
    }


_DISTRIBUTIONS = (
    "torch",
    "transformers",
    "bitsandbytes",
    "accelerate",
    "peft",
    "liger_kernel",
    "safetensors",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"

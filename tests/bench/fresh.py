"""A measurement in a process of its own: running one, its peak memory, and the machine it ran on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
_CHUNK_BYTES = 1 << 24


def run_fresh(module: str, worker: str, threads: int, python: str | None = None, **options: Any) -> dict[str, Any]:
    """`python -m module worker OPTIONS`, whose last line is JSON; "process_seconds" is added, imports and exit included.
    `python` is this interpreter, or another one that has a peer's packages."""
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


class PeakMemory:
    """This process's peak memory: resident (mapped files count) as the kernel keeps it, anonymous by looking often."""

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
        """In bytes."""
        return {"peak_resident": status_bytes("VmHWM"), "peak_anonymous": max(self._anonymous, status_bytes("RssAnon"))}

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self._anonymous = max(self._anonymous, status_bytes("RssAnon"))


def status_bytes(field: str) -> int:
    """A field of /proc/self/status; 0 where the kernel has none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def timed(function: Callable[[], object], warm_ups: int = 1, least: int = 3, seconds: float = 3.0) -> list[float]:
    """Seconds of each call after the warm-ups: at least so many calls, and so many seconds of them."""
    for _ in range(warm_ups):
        function()
    found: list[float] = []
    while len(found) < least or sum(found) < seconds:
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return found


def warm_cache(directory: Path) -> None:
    """Read every file once: the page cache cannot be dropped without privileges, so every measurement begins with it full."""
    for file in sorted(file for file in directory.rglob("*") if file.is_file()):
        with file.open("rb", buffering=0) as stream:
            while stream.read(_CHUNK_BYTES):
                pass


def machine() -> dict[str, Any]:
    """Versions, processor and load, for the record."""
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

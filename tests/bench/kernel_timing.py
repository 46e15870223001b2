"""Times and memory of calls on the GPU that is here, and what is compiled for them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CALLS = 20
"""In a row, for the host's time: fewer than a stream's queue holds."""


def timed(call: Callable[[], Any]) -> dict[str, float]:
    """Median and 20 % and 80 % quantiles, milliseconds, warmed up and with an empty second-level cache before each call; bytes
    that a call takes at most besides its inputs; microseconds of the host for a call."""
    from triton.testing import do_bench

    names = ("median_ms", "low_ms", "high_ms")
    times = dict(zip(names, do_bench(call, warmup=25, rep=100, quantiles=(0.5, 0.2, 0.8)), strict=True))
    return times | {"peak_bytes": float(_peak(call)), "host_us": _host(call)}


def _peak(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _host(call: Callable[[], Any]) -> float:
    """Until a call returns, which is before the GPU has done it; the least of some, since anything else on the machine adds."""
    found = []
    for _ in range(_CALLS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return 1e6 * min(found)


@contextmanager
def counted_compilations() -> Iterator[Counter[str]]:
    """Kernel -> how often it is compiled meanwhile; one that is not compiled again for other sizes stands low."""
    import triton  # type: ignore[import-untyped]

    found: Counter[str] = Counter()
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_post_compile_hook = lambda fn, **_: found.update([fn.name])
        yield found

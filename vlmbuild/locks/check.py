"""Check locks: make each again from its own config and recipe, and compare.

Locks of one model share one trace; models are distributed over processes.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from vlmbuild.builder.passes import exact_passes
from vlmbuild.builder.plugins import use_plugins
from vlmbuild.builder.tracing import Traced, trace
from vlmbuild.errors import UsageError, VlmbuildError
from vlmbuild.locks.difference import Difference, Severity, compare
from vlmbuild.locks.document import NO_KERNELS, Lock, lock_files, read_lock
from vlmbuild.locks.make import lock_traced
from vlmbuild.measure.pass_parity import Parity, pass_parity
from vlmbuild.util.child import INHERITED_PLUGINS
from vlmbuild.util.cpu import available_cores
from vlmbuild.util.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class Checked:
    """Result for one lock.

    Attributes:
        path: Lock file.
        difference: Differences between the lock and the code.
        error: Reason that the lock could not be read or made again, or "".
        seconds: Time in seconds; tracing counts for the first lock of a model only.
        unreadable: True if the file is no lock that this version reads.
        now: Lock that the code makes, with the old kernel table if kernels were skipped; None after an error.
    """

    path: Path
    difference: Difference
    error: str
    seconds: float
    now: Lock | None = None
    unreadable: bool = False

    def fails(self, limit: Severity = "cosmetic") -> bool:
        """Return whether the lock could not be compared, or a finding is at least as severe as `limit`."""
        return bool(self.error) or self.difference.fails(limit)


def check(
    paths: Iterable[str | Path], *, kernels: bool = True, processes: int | None = None, progress: Progress | None = None
) -> tuple[Checked, ...]:
    """Check locks.

    Args:
        paths: Lock files and folders of lock files.
        kernels: False skips kernels, which is faster.
        processes: Number of processes; None means one per core, at most one per model.
        progress: Called with a stage's name, the locks done, and their number.

    Returns:
        One result per lock, in the order of the paths.

    Raises:
        UsageError: A path contains no lock.
    """
    progress = progress or silent
    files = lock_files(paths)
    groups: dict[str, list[Path]] = {}
    done: dict[Path, Checked] = {}
    for file in files:
        try:
            groups.setdefault(json.dumps(read_lock(file).config, sort_keys=True), []).append(file)
        except UsageError as error:
            done[file] = replace(_failed(file, error, 0.0), unreadable=True)
    work = [(group, kernels) for group in groups.values()]
    count = min(len(work), processes or available_cores())
    for results in _run(work, count):
        done |= {result.path: result for result in results}
        progress("check", len(done), len(files))
    return tuple(done[file] for file in files)


def _run(work: Sequence[tuple[list[Path], bool]], processes: int) -> Iterable[list[Checked]]:
    if processes <= 1:
        yield from (check_group(*task) for task in work)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_prepare, initargs=tuple(INHERITED_PLUGINS)) as pool:
        yield from (future.result() for future in as_completed([pool.submit(check_group, *task) for task in work]))


def _prepare(*plugins: str) -> None:
    """Silence warnings as the command line does, use this process's plugins, and one thread: there is one process per core."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    use_plugins(*plugins)


def check_group(files: Sequence[Path], kernels: bool) -> list[Checked]:
    """Check the locks of one model, which is traced once."""
    locks = [read_lock(file) for file in files]
    started = time.perf_counter()
    try:
        traced = trace(locks[0].config, locks[0].source)
    except VlmbuildError as error:
        return [_failed(file, error, time.perf_counter() - started) for file in files]
    results = []
    for file, lock in zip(files, locks, strict=True):
        results.append(_checked(file, lock, traced, kernels and lock.kernels != NO_KERNELS, started))
        started = time.perf_counter()
    return results


def _checked(file: Path, lock: Lock, traced: Traced, kernels: bool, started: float) -> Checked:
    try:
        now = lock_traced(traced, lock.recipe, kernels=kernels)
    except VlmbuildError as error:
        return _failed(file, error, time.perf_counter() - started)
    difference = compare(lock, now)
    return Checked(file, difference, "", time.perf_counter() - started, keep_kernels(now, lock))


def _failed(file: Path, error: VlmbuildError, seconds: float) -> Checked:
    return Checked(file, Difference(()), str(error), seconds)


def keep_kernels(now: Lock, old: Lock | None) -> Lock:
    """Copy the kernel table of the old lock if the new one was made without kernels."""
    return replace(now, kernels=old.kernels) if old is not None and now.kernels.skipped else now


def lock_parities(paths: Iterable[str | Path]) -> dict[Path, Parity]:
    """Compute `pass_parity` for the model and recipe of each lock; equal passes are computed once.

    Raises:
        UsageError: A path contains no lock.
    """
    known: dict[str, Parity] = {}
    return {file: _parity(file, known) for file in lock_files(paths)}


def _parity(file: Path, known: dict[str, Parity]) -> Parity:
    try:
        lock = read_lock(file)
        passes = exact_passes(replace(lock.recipe, attention="auto"))  # Triton's kernels need a GPU; "auto" runs here
        key = f"{sorted(lock.config.items(), key=str)}{passes}"
        if key not in known:
            traced = trace(lock.config, lock.source)
            known[key] = pass_parity(traced.program, traced.family, traced.config, passes)
        return known[key]
    except VlmbuildError as error:
        return Parity((), str(error))

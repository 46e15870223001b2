"""Parity of the models of locks under their recipes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from vlmbuild.builder.passes import exact_passes
from vlmbuild.builder.tracing import trace
from vlmbuild.errors import VlmbuildError
from vlmbuild.locks.document import lock_files, read_lock
from vlmbuild.measure.pass_parity import Parity, pass_parity


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

"""Read a job and write values; the protocol is in `vlmbuild/engines/ask.py`."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MISSING = 86


def read_job() -> dict[str, Any]:
    """Read the job that the command line names."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return job


def require(*packages: str) -> list[Any]:
    """Import packages; without one of them, say so and end."""
    modules = []
    for package in packages:
        try:
            modules.append(importlib.import_module(package))
        except ImportError as error:
            print(f"{package} cannot be imported: {error}", file=sys.stderr)
            sys.exit(MISSING)
    return modules


class Case:
    """A case, and what the engine shows of it.

    Attributes:
        given: The case of the job.
        shown: Its entry in the result.
    """

    def __init__(self, given: Mapping[str, Any], number: int, out: Path) -> None:
        self.given = given
        self.shown: dict[str, Any] = {}
        self._number, self._out = number, out
        self._stage = "tokens"

    def enter(self, stage: str) -> None:
        """Name the stage that begins, which an error belongs to."""
        self._stage = stage

    def value(self, stage: str, array: Any) -> None:
        """Write an array of numpy as a stage's value."""
        array.astype("<f4").tofile(self._out / f"{self._number}.{stage}.f32")
        self.shown.setdefault("values", {})[stage] = list(array.shape)

    def attempt(self, run: Callable[[Case], None]) -> None:
        """Run the engine on the case; an error is what it shows, unless it is a package that is missing."""
        try:
            run(self)
        except ImportError as error:
            print(" ".join(str(error).split()), file=sys.stderr)
            sys.exit(MISSING)
        except Exception as error:  # an engine's own
            message = " ".join(str(error).split())[:300]
            self.shown["failed"] = [self._stage, f"{type(error).__name__}: {message}"]


def start(main: Callable[[], None]) -> None:
    """Run a worker's main function; a package that is missing is named."""
    try:
        main()
    except ImportError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(MISSING)


def answer(
    job: Mapping[str, Any],
    version: str,
    run: Callable[[Case], None],
    dtype: str | None = None,
    known: Mapping[str, str] | None = None,
) -> None:
    """Run the engine on all cases, and write the result.

    Args:
        job: The job.
        version: Version of the engine.
        run: Runs a case.
        dtype: Dtype in which it computes, if not the artifact's.
        known: How it is known to differ, by stage.
    """
    out = Path(job["out"])
    cases = [Case(given, number, out) for number, given in enumerate(job["cases"])]
    for case in cases:
        case.attempt(run)
    document = {"version": version, "dtype": dtype, "known": dict(known or {}), "cases": [case.shown for case in cases]}
    (out / "result.json").write_text(json.dumps(document), encoding="utf-8")

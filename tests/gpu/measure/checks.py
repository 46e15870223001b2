"""Every Triton kernel against float64: the tests of tests/gpu, with unwritten memory poisoned; then compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.measure.record import MissingError, Record, Setting, version

TESTS = Path(__file__).parents[1]
ONE = ("test_cross_entropy_kernel.py", "-k", "7-0.0")
"""Tests of the rehearsal and of compute-sanitizer."""
_PROCESSES = 6
_SANITIZER_SECONDS = 30


class _Outcomes:
    """A pytest plugin that counts outcomes for each file, and keeps what failed."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.rows: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        name = report.nodeid.partition("::")[0].rpartition("/")[2]
        if name not in self.rows:
            self.rows[name] = {"name": name, "passed": 0}
            self.record.rows.append(self.rows[name])
        row = self.rows[name]
        if report.failed:
            row["failed"] = f"{row.get('failed', '')} {report.nodeid.partition('::')[2]}".strip()
            row.setdefault("trace", report.longreprtext[-1500:])
        elif report.skipped:
            row.setdefault("left_out", {})[report.nodeid.partition("::")[2]] = str(report.longrepr[-1])[:200]
        else:
            row["passed"] += 1
        self.record.write()


def run(record: Record, setting: Setting) -> None:
    """Run the tests in several processes where pytest-xdist is there, then one file under compute-sanitizer."""
    options = ["-q", "-p", "no:cacheprovider", f"--confcutdir={TESTS}", "-o", f"pythonpath={TESTS.parent / 'helpers'}"]
    options += ["-o", "addopts="]
    parallel = version("pytest-xdist") != "absent" and not setting.small
    chosen = [str(TESTS / ONE[0]), *ONE[1:]] if setting.small else [str(TESTS)]
    code = pytest.main([*options, *(["-n", str(_PROCESSES)] if parallel else []), *chosen], plugins=[_Outcomes(record)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        with record.row("pytest"):
            raise RuntimeError(f"pytest ended with {code!r}; see log/kernels.txt")
    with record.row("compute-sanitizer memcheck") as row:
        row["tests"] = " ".join(ONE)
        _sanitize(options)


def _sanitize(options: list[str]) -> None:
    tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if tool is None:
        raise MissingError("compute-sanitizer is not on PATH nor in /usr/local/cuda/bin")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-W", "ignore", "-m", "pytest"]
    command += [*options, str(TESTS / ONE[0]), *ONE[1:]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SANITIZER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise MissingError(f"compute-sanitizer did not end within {_SANITIZER_SECONDS} s") from None
    if "not supported" in done.stdout:  # seen on virtual machines
        raise MissingError("compute-sanitizer does not support this device")
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stdout[-800:]}")

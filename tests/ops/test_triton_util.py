"""Runs the Triton kernels' parity checks on a CPU, in a process of its own: the interpreter is chosen at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKS = Path(__file__).parents[1] / "gpu"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the GPU itself")
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is Linux only")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_operators_import_without_triton() -> None:
    """Triton is Linux only; a CPU artifact has to load without it, and the Triton operator to say what is missing."""
    program = """
import sys
sys.modules["triton"] = None
import importlib.util, torch, vlmbuild.ops
from vlmbuild.errors import DeviceError
query = torch.randn(1, 2, 5, 8)
assert torch.ops.vlmbuild.attention_auto(query, query, query, None, None, None, None, True, 0.5).shape == (1, 5, 2, 8)
try:
    torch.ops.vlmbuild.attention_triton(query, query, query, None, None, None, None, True, 0.5)
except DeviceError as error:
    assert "not installed" in str(error), error
else:
    raise AssertionError("no error")
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]

"""Where kernels are tested: on a GPU, or on a CPU in Triton's interpreter, which must be chosen before triton is imported."""

from __future__ import annotations

import os
import zlib

import exactness
import pytest
import torch

GPU = torch.cuda.is_available()
collect_ignore_glob: list[str] = []
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob.append("test_*.py")  # tests/ops/test_triton_util.py runs them in a process of its own


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def drawn(request):
    """Seed each test: its inputs do not depend on tests that ran before it."""
    exactness.GENERATOR.manual_seed(exactness.SEED + zlib.crc32(request.node.nodeid.rpartition("/")[2].encode()))

"""The benchmark of the kernels, on small sizes: every call and every peer runs and agrees before a long run is begun."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is Linux only")

from tests.bench.kernels import smoke


def test_every_kernel_and_peer_runs_and_agrees():
    pytest.importorskip("bitsandbytes")
    rows = list(smoke())
    assert {row["name"].partition(":")[0] for row in rows} == {
        "attention forward", "attention backward", "attention of one row", "rotation forward", "rotation backward",
        "nf4 linear forward", "nf4 linear input gradient", "int8 linear forward", "int8 linear input gradient",
        "lora forward", "lora gradients", "cross-entropy with gradient", "linear and cross-entropy with gradients",
        "sum and RMSNorm by inductor",
    }  # fmt: skip
    assert {peer for row in rows for peer in row["peers"]} >= {"flex", "sdpa", "bitsandbytes", "transformers eager"}

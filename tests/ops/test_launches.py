"""The sizes that a kernel is compiled for: Triton's own launcher with a stub for a GPU's driver."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is Linux only")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vlmbuild.ops.attention.op import Masks
from vlmbuild.ops.attention.triton import backward_launches, forward_launch
from vlmbuild.ops.cross_entropy.triton import cross_entropy_launch
from vlmbuild.ops.rope.triton import rotate_launch

HALF = torch.bfloat16
LENGTHS = (2, 15, 16, 17, 100, 512, 1009, 4096)


class Compiled:
    """A kernel that does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments):
        return None

    def run(self, *arguments):
        """Nothing."""


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """List the names of kernels, one for each time that one is compiled."""
    found = []
    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 90,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(driver, "_active", gpu)

    def compile(kernel, key, *arguments):
        found.append(kernel.__name__.strip("_"))
        kernel.device_caches[90][0][key] = Compiled()
        return kernel.device_caches[90][0][key]

    kernels = []
    monkeypatch.setattr(
        JITFunction, "_do_compile", lambda kernel, *rest: kernels.append(kernel) or compile(kernel, *rest)
    )
    yield found
    for kernel in kernels:
        kernel.device_caches.pop(90, None)


def meta(*shape, dtype=HALF):
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(batch, length, kind):
    """Forward and backward; all but padded ones are of one packed row."""
    batch = batch if kind == "padded" else 1
    query, key = (meta(batch, length, heads, 128).transpose(1, 2) for heads in (12, 2))
    masks = {
        "padded": Masks(meta(batch, length, dtype=torch.bool)),
        "packed": Masks(None, meta(7, dtype=torch.int32)),
        "groups": Masks(None, None, meta(length, dtype=torch.int32), meta(length, 5, dtype=torch.bool)),
    }[kind]
    out, sums = meta(batch, length, 12, 128), meta(batch, 12, length, dtype=torch.float32)
    rest = (query, key, key, masks, out, sums)
    grads = (query.contiguous(), key.contiguous(), key.contiguous())
    causal = kind != "groups"
    yield forward_launch(*rest, causal, 0.1, 90)
    yield from backward_launches(out, *rest, sums, grads, causal, 0.1, 90)


def one_row(batch, length, kind):
    query, key = meta(batch, 12, 1, 128), meta(batch, 2, 600 + length, 128)
    mask = Masks(meta(batch, 600 + length, dtype=torch.bool))
    yield forward_launch(
        query, key, key, mask, meta(batch, 1, 12, 128), meta(batch, 12, 1, dtype=torch.float32), True, 0.1, 90
    )


def rotation(batch, length, kind):
    query, key = (meta(batch, length, heads, 128).transpose(1, 2) for heads in (12, 2))
    angle = meta(batch, length, 64, dtype=torch.float32)
    yield rotate_launch(query, key, angle, angle, query, key)


def loss(batch, length, kind):
    logits, rows = meta(batch * length, 151936), batch * length
    yield cross_entropy_launch(logits, meta(rows, dtype=torch.int64), meta(rows, dtype=torch.float32), logits)


KINDS = [
    *((attention, kind) for kind in ("padded", "packed", "groups")),
    (one_row, ""),
    (rotation, ""),
    (loss, ""),
]


@pytest.mark.parametrize(("make", "kind"), KINDS)
def test_a_kernel_is_compiled_once_for_all_batches_and_lengths(make, kind, compiled):
    for batch in (1, 2, 3, 16):
        for length in LENGTHS:
            for launch in make(batch, length, kind):
                launch.run()
    assert len(compiled) == len(set(compiled)), compiled

"""What a launch costs on the host, and which sizes a kernel is compiled for: Triton's own launcher, with a GPU's driver stubbed."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is Linux only")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vlmbuild.ops.attention.op import Masks
from vlmbuild.ops.attention.triton import backward_launches, forward_launches
from vlmbuild.ops.cross_entropy.triton import cross_entropy_launch
from vlmbuild.ops.linear_4bit import triton as linear_4bit_triton
from vlmbuild.ops.linear_8bit import triton as linear_8bit_triton
from vlmbuild.ops.lora import triton as lora_triton
from vlmbuild.ops.rope.triton import rotate_launch

HALF = torch.bfloat16
LENGTHS = (2, 15, 16, 17, 100, 512, 1009, 4096)
SLOW = 3
"""How much slower than intended a machine that runs tests may be."""


class Compiled:
    """A kernel that does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments):
        return None

    def run(self, *arguments):
        """Nothing."""


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """Names of kernels, one for each time that one is compiled."""
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
    yield from forward_launches(*rest, causal, 0.1, 90)
    yield from backward_launches(out, *rest, sums, grads, causal, 0.1, 90)


def one_row(batch, length, kind):
    query, key = meta(batch, 12, 1, 128), meta(batch, 2, 600 + length, 128)
    mask = Masks(meta(batch, 600 + length, dtype=torch.bool))
    yield from forward_launches(
        query, key, key, mask, meta(batch, 1, 12, 128), meta(batch, 12, 1, dtype=torch.float32), True, 0.1, 90
    )


def rotation(batch, length, kind):
    query, key = (meta(batch, length, heads, 128).transpose(1, 2) for heads in (12, 2))
    angle = meta(batch, length, 64, dtype=torch.float32)
    yield rotate_launch(query, key, angle, angle, query, key)


def linear(batch, length, kind):
    """Of rows that take the largest tile, as all but steps of generation do."""
    rows, wide, narrow = 65 + batch * length, 1536, 8960
    x, out = meta(rows, narrow), meta(rows, wide)
    if kind == "nf4":
        blocks = wide * narrow // 64
        buffers = (
            meta(wide * narrow // 2, dtype=torch.uint8),
            meta(blocks, dtype=torch.uint8),
            meta(-(-blocks // 256), dtype=torch.float32),
            meta(dtype=torch.float32),
        )
        geometry = (narrow, wide, 64, "nf4", HALF)
        yield linear_4bit_triton.linear_launch(x, buffers, None, out, geometry, 90)
        yield linear_4bit_triton.grad_input_launch(out, buffers, x, geometry, 90)
        return
    weight, scales, columns = (
        meta(wide, narrow, dtype=torch.int8),
        meta(wide, dtype=torch.float32),
        meta(1 + narrow, dtype=torch.int32),
    )
    known, flags = (
        (meta(rows, narrow, dtype=torch.int8), meta(rows, dtype=torch.float32), columns),
        meta(narrow, dtype=torch.uint8),
    )
    yield linear_8bit_triton.outliers_launch(x, flags, 6.0)
    yield linear_8bit_triton.quantize_launch(x, flags, *known, 6.0)
    yield linear_8bit_triton.linear_8bit_launch(x, *known, weight, scales, None, out, 90, outliers=True)
    yield linear_8bit_triton.grad_input_8bit_launch(out, weight, scales, x, 90)


def lora(batch, length, kind):
    x, result, low = (
        meta(batch * length, 1536),
        meta(batch * length, 8960),
        meta(batch * length, 16, dtype=torch.float32),
    )
    down, up = meta(16, 1536, dtype=torch.float32), meta(8960, 16, dtype=torch.float32)
    yield lora_triton.low_launch(x, down, low, 1.0)
    yield lora_triton.sum_launch(result, low, up.T, result, 1.0)
    yield lora_triton.matrix_gradient_launch(x, low, down, 1.0)


def loss(batch, length, kind):
    logits, rows = meta(batch * length, 151936), batch * length
    yield cross_entropy_launch(logits, meta(rows, dtype=torch.int64), meta(rows, dtype=torch.float32), logits)


KINDS = [
    *((attention, kind) for kind in ("padded", "packed", "groups")),
    (one_row, ""),
    (rotation, ""),
    (linear, "nf4"),
    (linear, "int8"),
    (lora, ""),
    (loss, ""),
]


@pytest.mark.parametrize(("make", "kind"), KINDS)
def test_a_kernel_is_compiled_once_for_all_batches_and_lengths(make, kind, compiled):
    for batch in (1, 2, 3, 16):
        for length in LENGTHS:
            for launch in make(batch, length, kind):
                launch.run()
    assert len(compiled) == len(set(compiled)), compiled


@pytest.mark.parametrize(("make", "kind"), KINDS)
def test_a_launch_takes_the_host_twenty_microseconds(make, kind):
    """Making it, and Triton's way to the driver; the least of some times, since anything else on the machine adds."""
    launches = len(list(make(1, 100, kind)))

    def timed():
        started = time.perf_counter()
        for launch in make(1, 100, kind):
            launch.run()
        return (time.perf_counter() - started) / launches

    timed()
    assert min(timed() for _ in range(30)) < SLOW * 20e-6

"""Compile the kernels for sm_90 without a GPU, into a folder that TRITON_CACHE_DIR names on the machine with one.

The launches go through Triton's own launcher with a driver that only knows the target, so that the keys of the cache are those
that the machine looks up. They hold Triton's files and the kernels' source: the machine must have the same Triton wheel. The
C stub that starts each kernel depends on Python too, and is compiled there, about half a second each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.gpu.measure.attention import SHAPES, Shape
from tests.gpu.measure.record import version

TARGET = 90


class _Driver:
    """A driver of a GPU that is not here."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", TARGET, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_kernels(cache: Path) -> int:
    """Compile every launch of the measured attention shapes, the rotation and the loss in bfloat16."""
    cache.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(cache.resolve())
    import triton

    triton.knobs.cache.dir = str(cache.resolve())
    triton.runtime.driver.set_active(_Driver())
    count = 0
    for launch in _launches():
        launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.constants, **launch.tile)
        count += 1
    compiled = len(list(cache.rglob("*.cubin")))
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    print(f"{cache}: {compiled} kernels of {count} launches, {size / 1e6:.1f} MB, for triton {version('triton')} alone")
    return 0 if compiled else 1


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Make a tensor whose address is a multiple of 16, like a GPU's."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _launches() -> Iterator[Any]:
    from vlmbuild.ops.cross_entropy.triton import cross_entropy_launch
    from vlmbuild.ops.rope.triton import rotate_launch

    for shape in SHAPES:
        yield from _attention(shape)
    for heads, key_heads, dim in ((28, 4, 128), (16, 16, 80)):
        query, key = (_empty(1, 4096, many, dim).transpose(1, 2) for many in (heads, key_heads))
        cos, sin = (_empty(1, 4096, dim // 2, dtype=torch.float32) for _ in range(2))
        for back in (False, True):
            yield rotate_launch(query, key, cos, sin, torch.empty_like(query), torch.empty_like(key), back=back)
    rows, vocabulary = 256, 152064
    logits, targets = _empty(rows, vocabulary), _empty(rows, dtype=torch.int64)
    yield cross_entropy_launch(logits, targets, _empty(rows, dtype=torch.float32), torch.empty_like(logits))


def _attention(shape: Shape) -> Iterator[Any]:
    from vlmbuild.ops.attention.op import Masks
    from vlmbuild.ops.attention.triton import backward_launches, forward_launch

    sizes = (shape.heads, shape.key_heads, shape.key_heads)
    tensors = [_empty(1, shape.length, heads, shape.dim).transpose(1, 2) for heads in sizes]
    masks = Masks(cu_seqlens=_empty(shape.segments + 1, dtype=torch.int32))
    out = _empty(1, shape.length, shape.heads, shape.dim)
    logsumexp = _empty(1, shape.heads, shape.length, dtype=torch.float32)
    options = (shape.causal, shape.dim**-0.5, TARGET)
    yield forward_launch(*tensors, masks, out, logsumexp, *options)
    grads = tuple(_empty(*x.shape) for x in tensors)
    yield from backward_launches(
        torch.empty_like(out), *tensors, masks, out, logsumexp, torch.empty_like(logsumexp), grads, *options
    )

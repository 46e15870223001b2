"""Helpers of Triton launchers: whether Triton can run on a tensor, compile-time constants, and the launch as a value."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from vlmbuild.errors import DeviceError

# Decided by TRITON_INTERPRET when triton is first imported; the interpreter runs kernels on CPU tensors.
INTERPRET: bool = bool(triton.knobs.runtime.interpret)

OLDEST = 80
"""The least compute capability that kernels are made for: bfloat16 on tensor cores, asynchronous copies."""


def require_device(operator: str, tensor: Tensor) -> None:
    """Raise DeviceError unless Triton can run on the tensor's device."""
    if not tensor.is_cuda and not INTERPRET:
        raise DeviceError(
            f"{operator}: the Triton kernel needs a CUDA tensor, got one on {tensor.device}; "
            "use the 'sdpa' or 'auto' implementation there"
        )


def power_of_two(n: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `n` and `least` (a tile's side must be one)."""
    return max(least, 1 << (n - 1).bit_length())


def ceil_div(a: int, b: int) -> int:
    """Return `a / b`, rounded up. Triton's own takes a microsecond, and a launch has several."""
    return -(-a // b)


def precision(dtype: torch.dtype) -> dict[str, str]:
    """Return the precision of products: by default tensor cores round float32 to ten bits of mantissa."""
    return {"PRECISION": "ieee" if dtype == torch.float32 else "tf32"}


class Launch(NamedTuple):
    """A launch of a kernel, to be run or only compiled (`vlmbuild.locks.kernel_table`).

    Attributes:
        kernel: The Triton function.
        grid: Programs in each dimension.
        arguments: Tensors and numbers, in order.
        constants: Compile-time constants that select the computation, by name.
        tile: Those that say how: sides of tiles and compiler options. They depend on the GPU.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    tile: dict[str, Any]

    def run(self) -> None:
        """Launch it on the current device."""
        self.kernel[self.grid](*self.arguments, **self.constants, **self.tile)


def target_of(tensor: Tensor) -> int:
    """Return the compute capability of the tensor's GPU, 90 for sm_90; the oldest one for the interpreter."""
    return _capability(tensor.device) if tensor.is_cuda else OLDEST


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor

"""The 4-bit linear layer on a CPU: a fused product for few rows, and dense weights in memory that stays mapped.

The fused product is bitsandbytes' operator for packed weights, on columns that correct its rounding. Dequantization calls C
functions of its library through ctypes, because its operator has no output to write to, and fresh memory costs page faults.
One bfloat16 layer of 4096 by 4096 on one core, milliseconds of CPU time, median of 15:

| rows | operator and matmul | dense weight in mapped memory | fused |
| --- | --- | --- | --- |
| 1 | 24.0 | 17.5 | 1.7 |
| 16 | 31.6 | 10.7 | 8.5 |
| 128 | 30.9 | 13.5 | |
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.storage import UntypedStorage

from vlmbuild.ops.linear_4bit.tables import code_4bit

# Up to here the fused product is the faster one on one and on two cores, and no prompt or training batch is as short. It
# reads a repacked copy of the weight, which is worth its memory only for decoding.
FEW_ROWS = 16
# Below this, malloc has the memory at hand. Above, it maps and unmaps it, and the page faults of a 27 MB weight take as
# long as the product of 128 rows.
SCRATCH_BYTES = 1 << 20
GROUP = 32  # neighbouring weights that share a correction
_TILE = 32  # rows that bitsandbytes' fused kernel interleaves
_CHUNK = 1 << 22  # values repacked at a time: bounds the memory, and many small steps would wait for threads at each
_SUFFIX = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@cache
def _library() -> Any:
    """Load bitsandbytes' native CPU library, or None where it has none."""
    from bitsandbytes.cextension import lib

    return lib if hasattr(lib, "cdequantize_blockwise_cpu_nf4_bf16") else None


@cache
def has_fused_product() -> bool:
    """Return whether bitsandbytes has its kernel for packed weights here, which needs AVX512-BF16."""
    import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes

    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::gemv_4bit", "CPU"))


class _Scratch(threading.local):
    """One buffer a thread, as large as the largest weight it has dequantized."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        size = prod(shape) * dtype.itemsize
        if self.buffer.numel() < size:
            # The old one goes first. Outside inference mode, whose tensors could not be written to by others.
            self.buffer = torch.empty(0, dtype=torch.uint8)
            with torch.inference_mode(False):
                self.buffer = torch.empty(size, dtype=torch.uint8)
        return self.buffer[:size].view(dtype).view(shape)


_SCRATCH = _Scratch()


def dequantize_into_scratch(
    weight: Tensor, scales: Tensor, rows: tuple[int, int], blocksize: int, quant_type: str, dtype: torch.dtype
) -> Tensor | None:
    """Return the dense `[rows]` weight, valid until this thread's next call; None where a new tensor is as fast.

    Args:
        weight: Packed uint8, contiguous.
        scales: Scales in float32, one a block, contiguous.
        rows: Shape of the result; whole blocks make a row, or the native kernel takes wrong scales.
        blocksize: Values per scale; below 2048.
        quant_type: "nf4" or "fp4".
        dtype: Dtype of the result.
    """
    library = _library()
    if library is None or prod(rows) * dtype.itemsize < SCRATCH_BYTES:
        return None
    dense = _SCRATCH.take(rows, dtype)
    sizes = (ctypes.c_longlong(size) for size in (blocksize, *rows))
    getattr(library, f"cdequantize_blockwise_cpu_{quant_type}_{_SUFFIX[dtype]}")(
        *_pointers(weight, scales, dense), *sizes
    )
    return dense


def _pointers(*tensors: Tensor) -> tuple[ctypes.c_void_p, ...]:
    return tuple(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)


@dataclass(frozen=True)
class _Repacked:
    """A weight as the fused kernel reads it: rows interleaved by 32, corrections as further columns."""

    weight: Tensor  # uint8 [out, wide / 2]
    scales: Tensor  # bfloat16 [wide / blocksize, out]
    wide: int
    source: tuple[tuple[int, int], ...]


_REPACKED: WeakKeyDictionary[UntypedStorage, dict[tuple[int, ...], _Repacked]] = WeakKeyDictionary()


def fits_fused(
    input: Tensor,
    buffers: tuple[Tensor | None, ...],
    in_features: int,
    out_features: int,
    blocksize: int,
    quant_type: str,
    weight_dtype: torch.dtype,
) -> bool:
    """Return whether `fused_product` takes these; not FP4, which would miss the bound on errors with rounded scales."""
    return (
        input.device.type == "cpu"
        and input.dtype == torch.bfloat16
        and weight_dtype != torch.float16
        and quant_type == "nf4"
        and 0 < input.numel() <= FEW_ROWS * in_features
        and out_features % _TILE == 0
        and in_features % blocksize == 0
        and blocksize <= 128  # corrections fill whole blocks of columns
        and has_fused_product()
        # Inference tensors have no version by which to see that they changed.
        and not any(buffer is not None and buffer.is_inference() for buffer in buffers)
    )


def fused_product(
    input: Tensor,
    buffers: tuple[Tensor | None, ...],
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    blocksize: int,
    dense_scales: Callable[[], Tensor],
) -> Tensor:
    """Compute `input @ weight.T + bias` for few rows of bfloat16, from packed weights, summed in float32.

    The kernel rounds scales and the table to bfloat16, which shifts the mean of every 32 weights. Further columns hold those
    shifts and are multiplied by the sums of the same 32 inputs. Without them an input whose mean is not zero would be up to
    ten times as wrong as a product with the weight in bfloat16; with them the errors are alike. The bias is the scale of one
    more block, a one and zeros: added afterwards, it would round the result twice.

    Args:
        input: Input in bfloat16, `[..., in]`.
        buffers: Packed weight, absmax, nested absmax or None, nested offset or None.
        bias: `[out]`, or None.
        in_features: Columns, a multiple of `blocksize`.
        out_features: Rows, a multiple of 32.
        blocksize: Values per scale.
        dense_scales: makes the float32 scales; called for a weight that is new, or has changed.
    """
    packed = _repacked(buffers, bias, in_features, out_features, blocksize, dense_scales)
    rows, groups = input.numel() // in_features, in_features // GROUP
    values = input.reshape(rows, in_features)
    wide = F.pad(values, (0, packed.wide - in_features))
    torch.sum(values.view(rows, groups, GROUP), -1, out=wide[:, in_features : in_features + groups])
    if bias is not None:
        wide[:, -1] = 1
    code, shape = code_4bit("nf4", input.device), (out_features, packed.wide)
    output: Tensor = torch.ops.bitsandbytes.gemv_4bit(wide, packed.weight, shape, packed.scales, code, blocksize)
    return output.view(*input.shape[:-1], out_features)


def forget(weight: Tensor) -> None:
    """Free the copy for `fused_product`, since training does not decode."""
    if _REPACKED:
        _REPACKED.pop(weight.untyped_storage(), None)


def _repacked(
    buffers: tuple[Tensor | None, ...],
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    blocksize: int,
    dense_scales: Callable[[], Tensor],
) -> _Repacked:
    weight = buffers[0]
    assert weight is not None
    source = tuple((buffer.data_ptr(), buffer._version) for buffer in (*buffers, bias) if buffer is not None)
    of_storage = _REPACKED.setdefault(weight.untyped_storage(), {})
    key = (int(weight.storage_offset()), in_features, out_features, blocksize)
    repacked = of_storage.get(key)
    if repacked is None or repacked.source != source:
        with torch.no_grad(), torch.inference_mode(False):
            packed, scales = _repack(
                weight.reshape(out_features, -1), dense_scales().view(out_features, -1), bias, blocksize
            )
        repacked = of_storage[key] = _Repacked(packed, scales, 2 * packed.shape[1], source)
    return repacked


def _repack(weight: Tensor, scales: Tensor, bias: Tensor | None, blocksize: int) -> tuple[Tensor, Tensor]:
    packed, columns = [], []
    # One more block a row: zeros, whose index is 7, and a one, whose index is 15.
    one = torch.full((weight.shape[0], 0 if bias is None else blocksize // 2), 0x77, dtype=torch.uint8)
    one[:, -1:] = 0x7F
    of_one = scales[:, :0] if bias is None else bias.to(torch.float32).unsqueeze(1)
    step = max(_CHUNK // (2 * weight.shape[1]) // _TILE, 1) * _TILE
    for i in range(0, weight.shape[0], step):
        rows = slice(i, i + step)
        corrections, of_corrections = _corrections(weight[rows], scales[rows], blocksize)
        packed.append(_interleave(torch.cat((weight[rows], corrections, one[rows]), 1)))
        columns.append(torch.cat((scales[rows], of_corrections, of_one[rows]), 1).bfloat16())
    return torch.cat(packed), torch.cat(columns).t().contiguous()


def _corrections(weight: Tensor, scales: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return the mean that the kernel's rounding takes from every 32 weights, in NF4: packed values and scales."""
    from bitsandbytes.functional import quantize_4bit

    out, half = weight.shape
    look_up = torch.ops.bitsandbytes.dequantize_4bit
    unscaled = (weight, torch.ones_like(scales), blocksize, "nf4", (out, 2 * half))
    exact, rounded = (
        look_up(*unscaled, dtype).view(out, -1, GROUP).mean(-1, dtype=torch.float32)
        for dtype in (torch.float32, torch.bfloat16)
    )
    spread = scales.repeat_interleave(blocksize // GROUP, dim=1)
    shift = exact * spread - rounded * spread.bfloat16().float()
    shift = F.pad(shift, (0, -shift.shape[1] % blocksize))
    packed, state = quantize_4bit(shift, blocksize=blocksize, quant_type="nf4")
    return packed.view(out, -1), state.absmax.view(out, -1)


def _interleave(weight: Tensor) -> Tensor:
    """Lay out tiles for the kernel: byte 2r + p of a column pair holds values of parity p, row r low and row r + 16 high."""
    out = weight.shape[0]
    first, second = weight.view(out // _TILE, 2, _TILE // 2, -1).unbind(1)
    even = (second & 0xF0) | (first >> 4)
    odd = ((second & 15) << 4) | (first & 15)
    return torch.stack((even, odd), -1).transpose(1, 2).reshape(out, -1)

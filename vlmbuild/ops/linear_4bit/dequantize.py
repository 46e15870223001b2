"""4-bit weights in the bitsandbytes layout (QLoRA, arXiv:2305.14314, section 3): checks and dequantization.

Two values share a byte, the earlier one in the high nibble. Each is an index into a 16-entry table; `blocksize` consecutive
values share a float32 scale. With double quantization the scales are themselves 8-bit indices into bitsandbytes' dynamic map,
scaled per 256 and shifted by one offset.

On a CPU a call's dense weight lies in memory that stays mapped. C functions of bitsandbytes' library write to it through
ctypes, because its operator has no output to write to, and fresh memory costs page faults. One bfloat16 layer of 4096 by
4096 on one core, milliseconds of CPU time, median of 15; the last column is `vlmbuild.ops.linear_4bit.cpu`:

| rows | operator and matmul | dense weight in mapped memory | fused |
| --- | --- | --- | --- |
| 1 | 24.0 | 17.5 | 1.7 |
| 16 | 31.6 | 10.7 | 8.5 |
| 128 | 30.9 | 13.5 | |
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.formats import BLOCK_SIZES, NESTED_BLOCKSIZE
from vlmbuild.util.dtypes import FLOATS

# Below this, malloc has the memory at hand. Above, it maps and unmaps it, and the page faults of a 27 MB weight take as
# long as the product of 128 rows.
SCRATCH_BYTES = 1 << 20
_SUFFIX = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Packed4bit(NamedTuple):
    """A weight as operators take it.

    Attributes:
        weight: Packed uint8, `ceil(out * in / 2)` elements.
        absmax: Scales, float32 `[blocks]`; uint8 when they are quantized too.
        nested_absmax: Scales of quantized scales, float32 `[ceil(blocks / 256)]`, or None.
        nested_offset: Offset of quantized scales, float32 scalar, or None.
        in_features: Columns of the dense weight.
        out_features: Rows of the dense weight.
        blocksize: Values per scale.
        quant_type: "nf4" or "fp4".
        weight_dtype: Dtype of the dense weight.
    """

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    in_features: int
    out_features: int
    blocksize: int
    quant_type: str
    weight_dtype: torch.dtype

    def buffers(self) -> tuple[Tensor, ...]:
        """Return the tensors that are there."""
        return tuple(buffer for buffer in self[:4] if buffer is not None)


@cache
def code_4bit(quant_type: str, device: torch.device) -> Tensor:
    """Return the 16 float32 values of "nf4" or "fp4"."""
    from bitsandbytes.functional import get_4bit_type

    code: Tensor = get_4bit_type(quant_type, device=torch.device("cpu"))  # type: ignore[no-untyped-call]
    return code.to(device)


@cache
def code_8bit(device: torch.device) -> Tensor:
    """Return the 256 float32 values that double-quantized scales index."""
    from bitsandbytes.functional import create_dynamic_map

    code: Tensor = create_dynamic_map().to(device)  # type: ignore[no-untyped-call]
    return code


def check_weight(packed: Packed4bit) -> None:
    """Raise UsageError unless every buffer has the size and dtype the geometry needs: kernels do not check.

    Sizes are all that is checked, so this also serves tensors without data.
    """
    kind, blocksize, dtype = packed.quant_type, packed.blocksize, packed.weight_dtype
    if kind not in ("nf4", "fp4") or blocksize not in BLOCK_SIZES or dtype not in FLOATS:
        raise UsageError(
            f"linear_4bit: quant_type {kind!r}, blocksize {blocksize}, weight_dtype {dtype}; wanted 'nf4' or 'fp4', one "
            f"of {BLOCK_SIZES}, and float32, float16 or bfloat16"
        )
    values = packed.in_features * packed.out_features
    blocks = -(-values // blocksize)
    _check_buffer("weight", packed.weight, torch.uint8, (values + 1) // 2)
    if (packed.nested_absmax is None) != (packed.nested_offset is None):
        raise UsageError("linear_4bit: nested_absmax and nested_offset come together, or not at all")
    if packed.nested_absmax is None or packed.nested_offset is None:
        _check_buffer("absmax", packed.absmax, torch.float32, blocks)
        return
    _check_buffer("absmax", packed.absmax, torch.uint8, blocks)
    _check_buffer("nested_absmax", packed.nested_absmax, torch.float32, -(-blocks // NESTED_BLOCKSIZE))
    _check_buffer("nested_offset", packed.nested_offset, torch.float32, 1)


def _check_buffer(name: str, buffer: Tensor, dtype: torch.dtype, size: int) -> None:
    if buffer.dtype != dtype or buffer.numel() != size:
        raise UsageError(
            f"linear_4bit: {name} has {buffer.numel()} elements of {buffer.dtype}; the layer's shape and block size "
            f"need {size} of {dtype}"
        )


def scales_reference(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> Tensor:
    """Compute the float32 scale of every block, in plain torch."""
    if nested_absmax is None or nested_offset is None:
        return absmax
    outer = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    return code_8bit(absmax.device)[absmax.long()] * outer + nested_offset


def dequantize_reference(packed: Packed4bit) -> Tensor:
    """Compute `dequantize_4bit` in plain torch."""
    scales = scales_reference(packed.absmax, packed.nested_absmax, packed.nested_offset)
    flat = packed.weight.flatten()
    count = packed.in_features * packed.out_features
    nibbles = torch.stack((flat >> 4, flat & 15), dim=-1).flatten()[:count]
    values = code_4bit(packed.quant_type, flat.device)[nibbles.long()]
    spread = scales.repeat_interleave(packed.blocksize)[:count]
    return (values * spread).to(packed.weight_dtype).view(packed.out_features, packed.in_features)


def dequantize_4bit(packed: Packed4bit) -> Tensor:
    """Compute the `[out_features, in_features]` weight, bit-identical to bitsandbytes' own.

    Raises:
        UsageError: A buffer's size or dtype does not fit.
    """
    check_weight(packed)
    return dequantize_unchecked(packed)


def dequantize_unchecked(packed: Packed4bit, *, reuse: bool = False) -> Tensor:
    """Run `dequantize_4bit` unchecked; with `reuse`, on a CPU, possibly in memory that the next such call overwrites."""
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes; slow, so not at the top)

    columns, out_features, blocksize = packed.in_features, packed.out_features, packed.blocksize
    values = columns * out_features
    on_cpu = packed.weight.device.type == "cpu"
    # bitsandbytes has no native CPU kernel for these and would compile one per shape; plain torch is ready at once.
    if on_cpu and (values % blocksize or blocksize >= 2048):
        return dequantize_reference(packed)
    weight, scales = packed.weight.contiguous(), dense_scales(packed).contiguous()
    # Its CPU kernel takes the wrong scale where a block runs over the end of a row, so rows are made of whole blocks.
    rows = (values // blocksize, blocksize) if on_cpu and columns % blocksize else (out_features, columns)
    dense: Tensor | None = None
    if on_cpu and reuse:
        dense = _dequantize_into_scratch(weight, scales, rows, packed)
    if dense is None:
        form = (blocksize, packed.quant_type, rows, packed.weight_dtype)
        dense = torch.ops.bitsandbytes.dequantize_4bit(weight, scales, *form)
    return dense.view(out_features, columns)


def dense_scales(packed: Packed4bit) -> Tensor:
    """Compute the float32 scale of every block."""
    if packed.nested_absmax is None or packed.nested_offset is None:
        return packed.absmax
    import bitsandbytes  # noqa: F401

    absmax, outer = packed.absmax.contiguous(), packed.nested_absmax.contiguous()
    code = code_8bit(absmax.device)
    scales: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(absmax, outer, code, NESTED_BLOCKSIZE, torch.float32)
    return scales + packed.nested_offset


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


@cache
def _library() -> Any:
    """Load bitsandbytes' native CPU library, or None where it has none."""
    from bitsandbytes.cextension import lib

    return lib if hasattr(lib, "cdequantize_blockwise_cpu_nf4_bf16") else None


def _dequantize_into_scratch(
    weight: Tensor, scales: Tensor, rows: tuple[int, int], packed: Packed4bit
) -> Tensor | None:
    """Return the dense `[rows]` weight, valid until this thread's next call; None where a new tensor is as fast.

    Whole blocks make a row, or the native kernel takes wrong scales; `weight` and `scales` are contiguous.
    """
    library, dtype = _library(), packed.weight_dtype
    if library is None or prod(rows) * dtype.itemsize < SCRATCH_BYTES:
        return None
    dense = _SCRATCH.take(rows, dtype)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, scales, dense))
    sizes = (ctypes.c_longlong(size) for size in (packed.blocksize, *rows))
    getattr(library, f"cdequantize_blockwise_cpu_{packed.quant_type}_{_SUFFIX[dtype]}")(*pointers, *sizes)
    return dense

"""The fused product of a 4-bit linear layer on a CPU, for few rows.

It is bitsandbytes' operator for packed weights, on columns that correct its rounding; `vlmbuild.ops.linear_4bit.dequantize`
has the times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.storage import UntypedStorage

from vlmbuild.ops.linear_4bit.dequantize import Packed4bit, code_4bit, dense_scales

# Up to here the fused product is the faster one on one and on two cores, and no prompt or training batch is as short. It
# reads a repacked copy of the weight, which is worth its memory only for decoding.
FEW_ROWS = 16
GROUP = 32  # neighbouring weights that share a correction
_TILE = 32  # rows that bitsandbytes' fused kernel interleaves
_CHUNK = 1 << 22  # values repacked at a time: bounds the memory, and many small steps would wait for threads at each


@cache
def has_fused_product() -> bool:
    """Return whether bitsandbytes has its kernel for packed weights here, which needs AVX512-BF16."""
    import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes

    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::gemv_4bit", "CPU"))


@dataclass(frozen=True)
class _Repacked:
    """A weight as the fused kernel reads it: rows interleaved by 32, corrections as further columns."""

    weight: Tensor  # uint8 [out, wide / 2]
    scales: Tensor  # bfloat16 [wide / blocksize, out]
    wide: int
    source: tuple[tuple[int, int], ...]


_REPACKED: WeakKeyDictionary[UntypedStorage, dict[tuple[int, ...], _Repacked]] = WeakKeyDictionary()


def fits_fused(input: Tensor, packed: Packed4bit, bias: Tensor | None) -> bool:
    """Return whether `fused_product` takes these; not FP4, which would miss the bound on errors with rounded scales."""
    return (
        input.device.type == "cpu"
        and input.dtype == torch.bfloat16
        and packed.weight_dtype != torch.float16
        and packed.quant_type == "nf4"
        and 0 < input.numel() <= FEW_ROWS * packed.in_features
        and packed.out_features % _TILE == 0
        and packed.in_features % packed.blocksize == 0
        and packed.blocksize <= 128  # corrections fill whole blocks of columns
        and has_fused_product()
        # Inference tensors have no version by which to see that they changed.
        and not any(buffer.is_inference() for buffer in _sources(packed, bias))
    )


def _sources(packed: Packed4bit, bias: Tensor | None) -> tuple[Tensor, ...]:
    return packed.buffers() if bias is None else (*packed.buffers(), bias)


def fused_product(input: Tensor, packed: Packed4bit, bias: Tensor | None) -> Tensor:
    """Compute `input @ weight.T + bias` for few rows of bfloat16, from packed weights, summed in float32.

    The kernel rounds scales and the table to bfloat16, which shifts the mean of every 32 weights. Further columns hold those
    shifts and are multiplied by the sums of the same 32 inputs. Without them an input whose mean is not zero would be up to
    ten times as wrong as a product with the weight in bfloat16; with them the errors are alike. The bias is the scale of one
    more block, a one and zeros: added afterwards, it would round the result twice.
    """
    repacked = _repacked(packed, bias)
    rows, groups = input.numel() // packed.in_features, packed.in_features // GROUP
    values = input.reshape(rows, packed.in_features)
    wide = F.pad(values, (0, repacked.wide - packed.in_features))
    torch.sum(values.view(rows, groups, GROUP), -1, out=wide[:, packed.in_features : packed.in_features + groups])
    if bias is not None:
        wide[:, -1] = 1
    code, shape = code_4bit("nf4", input.device), (packed.out_features, repacked.wide)
    output: Tensor = torch.ops.bitsandbytes.gemv_4bit(
        wide, repacked.weight, shape, repacked.scales, code, packed.blocksize
    )
    return output.view(*input.shape[:-1], packed.out_features)


def forget(weight: Tensor) -> None:
    """Free the copy for `fused_product`, since training does not decode."""
    if _REPACKED:
        _REPACKED.pop(weight.untyped_storage(), None)


def _repacked(packed: Packed4bit, bias: Tensor | None) -> _Repacked:
    """Return the copy, made again where a buffer changed."""
    source = tuple((buffer.data_ptr(), buffer._version) for buffer in _sources(packed, bias))
    of_storage = _REPACKED.setdefault(packed.weight.untyped_storage(), {})
    key = (int(packed.weight.storage_offset()), packed.in_features, packed.out_features, packed.blocksize)
    repacked = of_storage.get(key)
    if repacked is None or repacked.source != source:
        with torch.no_grad(), torch.inference_mode(False):
            rows = packed.weight.reshape(packed.out_features, -1)
            scales = dense_scales(packed).view(packed.out_features, -1)
            weight, columns = _repack(rows, scales, bias, packed.blocksize)
        repacked = of_storage[key] = _Repacked(weight, columns, 2 * weight.shape[1], source)
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

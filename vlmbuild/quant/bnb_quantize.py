"""4-bit quantization on a CPU, byte for byte as bitsandbytes' and an order of magnitude faster.

bitsandbytes scales a whole tensor and looks every value up in the 15 bounds between codes. Here a chunk that stays in
the cache is scaled and then passed over once a bound, in place, with vector instructions.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch

from vlmbuild.formats import NESTED_BLOCKSIZE

# Values scaled at a time: 1 MiB of scratch, about a level-2 cache. In much smaller chunks the calls cost more than the
# work.
_CHUNK: Final = 2**18
# Below it bitsandbytes does not scale a block any further; the same constant, or blocks of denormals would differ.
_SMALLEST_SCALE: Final = 1e-38
# A decided value is its code plus this, out of the way of the bounds and of scaled values, which end at 1.000001.
_DECIDED: Final = 2


@torch.no_grad()
def quantize_blocks(values: torch.Tensor, *, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize n flat float32, bfloat16 or float16 values: packed codes uint8 [ceil(n / 2)], absmax float32
    [ceil(n / blocksize)].

    The bytes are those of `bitsandbytes.functional.quantize_4bit`, whose quant_types and block sizes these are. Calls
    on consecutive chunks of a tensor, all but the last a multiple of `blocksize`, give the parts of what one gives.
    A block with NaN or infinity has an absmax that is not finite, and its codes mean nothing. Safe in several threads.
    """
    if values.device.type != "cpu":
        return _quantize_by_kernel(values, quant_type, blocksize)
    count = values.numel()
    whole = count - count % blocksize
    packed = values.new_empty((count + 1) // 2, dtype=torch.uint8)
    absmax = values.new_empty(-(-count // blocksize), dtype=torch.float32)
    step = max(_CHUNK // blocksize, 1) * blocksize
    scratch = values.new_empty(min(step, whole), dtype=torch.float32)
    codes = values.new_empty(min(step, whole), dtype=torch.int8)
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        scaled = scratch[: stop - start]
        _scale(values[start:stop], absmax[start // blocksize : stop // blocksize], scaled.view(-1, blocksize))
        _pack(scaled, codes[: stop - start], packed[start // 2 : stop // 2], quant_type)
    if whole < count:
        _quantize_rest(values[whole:], absmax[-1:], packed[whole // 2 :], quant_type)
    return packed, absmax


@torch.no_grad()
def quantize_scales(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize the scales absmax float32 [n] to codes uint8 [n], nested absmax float32 [ceil(n / 256)], and the
    offset, a float32 scalar.

    Equals bitsandbytes' `compress_statistics` on a CPU with one thread of torch, whatever their number here.
    """
    offset = _mean(absmax)
    codes, state = _functional().quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    return codes, state.absmax, offset


def _mean(values: torch.Tensor) -> torch.Tensor:
    # Threads would share one long sum, and its rounding, and with it the artifact, would depend on the number of cores.
    # Of several sums torch gives each to one thread, in the order of a single thread; set_num_threads(1) would also do
    # it, but for the whole process, in which others compute at the same time.
    if values.device.type != "cpu":
        return values.mean()
    return values.expand(2, -1).mean(dim=1)[0]


def _scale(values: torch.Tensor, absmax: torch.Tensor, scaled: torch.Tensor) -> None:
    """Write absmax [blocks], and the values [blocks * size] into `scaled` [blocks, size] as fractions of it."""
    values = values.view(scaled.shape)
    torch.amax(scaled.copy_(values).abs_(), dim=1, out=absmax)  # hands NaN on; blocks of -0.0 get 0.0
    reciprocal = absmax.clamp(min=_SMALLEST_SCALE).reciprocal_()
    scaled.copy_(values).mul_(reciprocal.unsqueeze(1))


def _pack(scaled: torch.Tensor, codes: torch.Tensor, packed: torch.Tensor, quant_type: str) -> None:
    """Write the codes of an even number of scaled values, two a byte. `scaled` and `codes` are scratch of that size.

    Each pass decides the values up to a bound. bitsandbytes' clamp to [-1, 1] would change no decision.
    """
    for bound, decided in _decisions(quant_type):
        torch.threshold_(scaled, bound, decided)
    codes.copy_(scaled).sub_(_DECIDED)
    # A pair read as a little-endian int16 is first + 256 * second. Times 4097, its high byte is 16 * first + second.
    pairs = codes.view(torch.int16).mul_(4097).bitwise_right_shift_(8)
    packed.copy_(pairs)  # keeps the low byte


def _quantize_rest(values: torch.Tensor, absmax: torch.Tensor, packed: torch.Tensor, quant_type: str) -> None:
    """Quantize the last block, not full, which bitsandbytes divides by its absmax, and whose absmax is never below 1e-38."""
    values = values.float()
    torch.amax(values.abs(), dim=0, keepdim=True, out=absmax).clamp_(min=_SMALLEST_SCALE)
    scaled = torch.zeros(2 * packed.numel(), dtype=torch.float32)  # an odd size is filled up with a zero
    torch.div(values, absmax, out=scaled[: values.numel()])
    _pack(scaled, torch.empty(scaled.shape, dtype=torch.int8), packed, quant_type)


def _quantize_by_kernel(values: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    packed, state = _functional().quantize_4bit(values.contiguous(), blocksize=blocksize, quant_type=quant_type)
    return packed.flatten(), state.absmax


@functools.cache
def _decisions(quant_type: str) -> tuple[tuple[float, float], ...]:
    """Return the 16 passes (bound, code of an undecided value up to it), from the lowest bound."""
    values = _functional().get_4bit_type(quant_type, device="cpu")
    order = torch.argsort(values)  # FP4's codes are not in the order of their values
    bounds = (values[order[:-1]] + values[order[1:]]) / 2
    above_all = 1.5  # scaled values are below it, decided ones above
    return tuple(zip([*bounds.tolist(), above_all], (order + _DECIDED).tolist(), strict=True))


def _functional() -> Any:
    from bitsandbytes import functional  # a dependency of quantized builds only

    return functional

"""Source checkpoints in AWQ's layout (arXiv:2306.00978; "gemm" of AutoAWQ): 4-bit integers with zero points in groups.

A layer [out, in] has `qweight` int32 [in, out / 8], `qzeros` int32 [in / group, out / 8] and `scales` [in / group, out].
A word holds eight columns, in an order of its own; `(number - zero) * scale` is the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from vlmbuild.formats import StaticShape, unfit
from vlmbuild.quant.dequantized import Dequantized, ReadRows, checked_scales, sharing, unpack, unread
from vlmbuild.util.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vlmbuild.artifact.weights_reader import CheckpointWeights
else:
    torch = LazyModule("torch")

BITS: Final = 4
ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word its first, second, ... column lies."""
SUFFIXES: Final = (".qweight", ".qzeros", ".scales")


def weights_in(weights: CheckpointWeights, config: Mapping[str, Any]) -> Iterator[Dequantized]:
    """Yield the weights; see `dequantized_weights`."""
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    for option, value, known in (
        ("bits", config.get("bits", BITS), BITS),
        ("zero_point", config.get("zero_point", True), True),
        ("version", version, "gemm"),
    ):
        if value != known:
            raise unread(weights, config, f"{option} is {value!r}, and {known!r} alone is known")
    for name in weights.tensors:
        if name.endswith(SUFFIXES[0]):
            module = name.removesuffix(SUFFIXES[0])
            shape, group = _shape(weights, module, config)
            parts = tuple(module + suffix for suffix in SUFFIXES)
            layout = f"{BITS} bits with zero points, {sharing(shape, (1, group))}"
            yield Dequantized(module, shape, parts, layout, partial(_open, weights, parts, group))


def _shape(weights: CheckpointWeights, module: str, config: Mapping[str, Any]) -> tuple[StaticShape, int]:
    """Return the shape [out, in] of a weight and the columns that share a scale."""
    name, found = f"{module}.qweight", [weights.tensors.get(module + suffix) for suffix in SUFFIXES]
    if any(info is None or len(info.shape) != 2 for info in found):
        raise unfit(weights, name, f"it has no matrices {', '.join(SUFFIXES[1:])} beside it")
    words, zeros, scales = (info for info in found if info is not None)
    columns, (groups, rows) = words.shape[0], scales.shape
    size, packed = config.get("group_size", 128), rows * BITS // 32
    if type(size) is not int or size == 0 or size < -1:
        raise unread(weights, config, f"group_size is {size!r}, and -1 and positive numbers are known")
    group = columns if size == -1 else size
    if words.dtype != torch.int32 or zeros.dtype != torch.int32 or rows % (32 // BITS):
        problem = f"it is {words.dtype} and .qzeros {zeros.dtype}, for {rows} rows; int32 and multiples of 8 are read"
        raise unfit(weights, name, problem)
    if words.shape[1] != packed or zeros.shape != (groups, packed) or groups * group != columns:
        raise unfit(weights, name, f"the shapes of its tensors do not fit {rows} rows in groups of {group}")
    return (rows, columns), group


def _open(weights: CheckpointWeights, parts: tuple[str, ...], group: int) -> ReadRows:
    words, zeros, scales = weights.read(parts[0]), weights.read(parts[1]), checked_scales(weights, parts[2])

    def rows(top: int, bottom: int) -> Tensor:
        first, last = top * BITS // 32, -(-bottom * BITS // 32)
        wanted = slice(top - first * 32 // BITS, bottom - first * 32 // BITS)
        numbers, offsets = (_in_order(unpack(x[:, first:last], BITS))[:, wanted] for x in (words, zeros))
        scaled = (numbers - offsets.repeat_interleave(group, dim=0)).float()
        return (scaled * scales[:, top:bottom].repeat_interleave(group, dim=0)).t().contiguous()

    return rows


def _in_order(numbers: Tensor) -> Tensor:
    words: Tensor = numbers.unflatten(1, (-1, 8))
    return words[..., list(ORDER)].flatten(1)

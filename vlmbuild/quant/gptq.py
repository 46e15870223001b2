"""Source checkpoints in GPTQ's layout (arXiv:2210.17323; AutoGPTQ's and GPTQModel's files): integers with zero points.

A layer [out, in] has `qweight` int32 [in * bits / 32, out], `qzeros` int32 [groups, out * bits / 32], `scales`
[groups, out] and `g_idx` [in], the group of each column. `(number - zero) * scale` is the weight. The format "gptq" stores
zero points less one, "gptq_v2" as they are.
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

BITS: Final = (2, 4, 8)
"""Bits that are read; numbers of 3 straddle words, in an order of their own."""
FORMATS: Final = {"gptq": 1, "gptq_v2": 0}
"""Name -> what is added to a stored zero point."""
SUFFIXES: Final = (".qweight", ".qzeros", ".scales", ".g_idx")


def weights_in(weights: CheckpointWeights, config: Mapping[str, Any]) -> Iterator[Dequantized]:
    """Yield the weights; see `dequantized_weights`."""
    bits, form = config.get("bits"), config.get("checkpoint_format") or config.get("format") or "gptq"
    if type(bits) is not int or bits not in BITS:
        raise unread(weights, config, f"bits is {bits!r}, and {', '.join(map(str, BITS))} are known")
    if not isinstance(form, str) or form not in FORMATS:
        raise unread(weights, config, f"checkpoint_format is {form!r}, and {', '.join(FORMATS)} are known")
    rules = config.get("dynamic") or {}
    if not isinstance(rules, Mapping) or not all(
        str(rule).startswith("-:") for rule in rules
    ):  # "-:" leaves layers out
        raise unread(weights, config, "dynamic gives some layers options of their own")
    for name in weights.tensors:
        if name.endswith(SUFFIXES[0]):
            module = name.removesuffix(SUFFIXES[0])
            parts = tuple(module + suffix for suffix in SUFFIXES)
            shape, groups = _shape(weights, module, bits)
            layout = f"{bits} bits with zero points, {sharing(shape, (1, -(-shape[1] // groups)))}"
            yield Dequantized(module, shape, parts, layout, partial(_open, weights, parts, bits, FORMATS[form]))


def _shape(weights: CheckpointWeights, module: str, bits: int) -> tuple[StaticShape, int]:
    """Return the shape [out, in] of a weight and its number of groups."""
    name, found = f"{module}.qweight", [weights.tensors.get(module + suffix) for suffix in SUFFIXES]
    if any(
        info is None or len(info.shape) != (1 if suffix == ".g_idx" else 2)
        for suffix, info in zip(SUFFIXES, found, strict=True)
    ):
        raise unfit(weights, name, f"it has no {', '.join(SUFFIXES[1:])} of two, two and one axes beside it")
    words, zeros, scales, index = (info for info in found if info is not None)
    (groups, rows), (columns,) = scales.shape, index.shape
    if not words.dtype == zeros.dtype == index.dtype == torch.int32:
        raise unfit(weights, name, "its words, zero points and groups are not int32")
    if columns * bits % 32 or rows * bits % 32 or not groups:
        raise unfit(weights, name, f"{rows} x {columns} numbers of {bits} bits in {groups} groups fill no whole words")
    if words.shape != (columns * bits // 32, rows) or zeros.shape != (groups, rows * bits // 32):
        raise unfit(weights, name, f"the shapes of its tensors do not fit {rows} x {columns} in {bits} bits")
    return (rows, columns), groups


def _open(weights: CheckpointWeights, parts: tuple[str, ...], bits: int, added: int) -> ReadRows:
    words, scales, index = weights.read(parts[0]), checked_scales(weights, parts[2]), weights.read(parts[3]).long()
    zeros = (unpack(weights.read(parts[1]), bits) + added) & (2**bits - 1)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(scales):
        raise unfit(weights, parts[0], f"{parts[3]} names groups from {index.min()} to {index.max()} of {len(scales)}")

    def rows(top: int, bottom: int) -> Tensor:
        numbers = unpack(words[:, top:bottom].t().contiguous(), bits)
        offsets, factors = (x[:, top:bottom].t()[:, index] for x in (zeros, scales))
        return (numbers - offsets).float() * factors

    return rows

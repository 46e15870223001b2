"""Source checkpoints in the layouts of the library compressed-tensors: integers or 8-bit floats, by channel, group or block.

`(number - zero) * scale` is the weight. Numbers lie in `weight`, int8 or float8, or packed in `weight_packed`, int32
[out, words], plus 2^(bits - 1), with the shape in `weight_shape`. Scales are in `weight_scale`, zero points in
`weight_zero_point`, packed along rows where the numbers are packed. Columns that are ordered by activations have the group of
each in `weight_g_idx`; numbers below zero there say that they lie in order. Quantization of inputs is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

FORMATS: Final = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
PACKED_BITS: Final = (1, 2, 4, 8)
"""Bits of packed numbers that are read; others straddle words."""
SCALE: Final = ".weight_scale"
INDEX: Final = ".weight_g_idx"
"""Suffix of the groups of a weight's columns."""
INPUTS: Final = (".input_scale", ".input_zero_point")
"""Suffixes of what belongs to quantized inputs."""

_CHUNK = 2**22
"""Elements that are dequantized at a time."""


@dataclass(frozen=True, slots=True)
class _Scheme:
    """How the numbers of a weight lie and what shares a scale.

    Attributes:
        bits: Bits of a packed number; 0 for numbers in whole bytes.
        shape: Shape of the weight.
        block: Rows and columns that share a scale.
    """

    bits: int
    shape: StaticShape
    block: tuple[int, int]


def weights_in(weights: CheckpointWeights, config: Mapping[str, Any]) -> Iterator[Dequantized]:
    """Yield the weights; see `dequantized_weights`."""
    groups = _groups(weights, config)
    for scale in weights.tensors:
        if not scale.endswith(SCALE):
            continue
        module = scale.removesuffix(SCALE)
        packed = f"{module}.weight_packed" in weights.tensors
        suffixes = (
            ".weight_packed" if packed else ".weight",
            SCALE,
            ".weight_zero_point",
            ".weight_shape",
            INDEX,
            *INPUTS,
        )
        parts = tuple(module + suffix for suffix in suffixes if module + suffix in weights.tensors)
        scheme, layout = _scheme(weights, module, suffixes[0], groups)
        yield Dequantized(module, scheme.shape, parts, layout, partial(_open, weights, module, suffixes[0], scheme))


def _groups(weights: CheckpointWeights, config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the options of weights that the config announces, and refuse what changes more than weights."""
    if config.get("format") not in FORMATS:
        raise unread(weights, config, f"format is {config.get('format')!r}, and {', '.join(FORMATS)} are known")
    transforms, sparsity = config.get("transform_config"), config.get("sparsity_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        raise unread(weights, config, "transform_config rotates activations")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise unread(weights, config, f"sparsity_config has the format {sparsity['format']!r}")
    if config.get("kv_cache_scheme"):
        raise unread(weights, config, "kv_cache_scheme quantizes keys and values")
    groups = config.get("config_groups")
    found = list(groups.values()) if isinstance(groups, Mapping) else []
    if not found or not all(isinstance(group, Mapping) for group in found):
        raise unread(weights, config, "config_groups has no groups")
    for group in found:
        if group.get("output_activations"):
            raise unread(weights, config, "outputs of layers are quantized")
        if group.get("format") not in (None, *FORMATS):
            raise unread(
                weights, config, f"a group's format is {group['format']!r}, and {', '.join(FORMATS)} are known"
            )
    return [group["weights"] for group in found if isinstance(group.get("weights"), Mapping)]


def _scheme(
    weights: CheckpointWeights, module: str, suffix: str, groups: list[Mapping[str, Any]]
) -> tuple[_Scheme, str]:
    """Return how a weight lies, by its tensors and the group that they fit, and the same for people."""
    shape, kind, widths = _numbers(weights, module, suffix)
    scales = weights.info(module + SCALE).shape
    zeros = f"{module}.weight_zero_point" in weights.tensors
    for group in groups:
        bits, block = group.get("num_bits", 8), _block(scales, shape, group)
        if block and group.get("type", "int") == kind and bits in widths and (zeros or group.get("symmetric", True)):
            numbers = f"{bits} bits" if kind == "int" else "8-bit floats"
            layout = f"{numbers}{' with zero points' if zeros else ''}, {sharing(shape, block)}"
            return _Scheme(bits if suffix == ".weight_packed" else 0, shape, block), layout
    options = ("type", "num_bits", "strategy", "group_size", "symmetric")
    announced = "; ".join(", ".join(f"{key} {group.get(key)!r}" for key in options) for group in groups)
    raise unfit(
        weights,
        module + suffix,
        f"{kind} {list(shape)} with scales {list(scales)}, {'with' if zeros else 'without'} zero points, fits no group of "
        f"config_groups ({announced}); packed numbers may have {', '.join(map(str, PACKED_BITS))} bits",
    )


def _numbers(weights: CheckpointWeights, module: str, suffix: str) -> tuple[StaticShape, str, tuple[int, ...]]:
    """Return a weight's shape, the type of its numbers, and the bits that they may have."""
    info = weights.info(module + suffix)
    if suffix == ".weight":
        if len(info.shape) != 2 or info.dtype not in (torch.int8, torch.float8_e4m3fn):
            raise unfit(
                weights, module + suffix, f"it is {info.dtype} {list(info.shape)}, not a matrix of 8-bit numbers"
            )
        return info.shape, "int" if info.dtype == torch.int8 else "float", tuple(range(1, 9))
    sizes = weights.info(f"{module}.weight_shape")
    if sizes.shape != (2,) or sizes.dtype not in (torch.int32, torch.int64):
        raise unfit(weights, module + suffix, f"weight_shape is {sizes.dtype} {list(sizes.shape)}, not two integers")
    shape = tuple(weights.read(f"{module}.weight_shape").tolist())
    if info.dtype != torch.int32 or len(info.shape) != 2 or info.shape[0] != shape[0]:
        raise unfit(
            weights, module + suffix, f"it is {info.dtype} {list(info.shape)}, and weight_shape says {list(shape)}"
        )
    return shape, "int", tuple(bits for bits in PACKED_BITS if info.shape[1] == math.ceil(shape[1] * bits / 32))


def _block(scales: StaticShape, shape: StaticShape, group: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale in a group of the config; None where the scales have another shape."""
    rows, columns = shape
    strategy, size = group.get("strategy"), group.get("group_size")
    if strategy == "tensor" and math.prod(scales) == 1:
        return rows, columns
    if strategy == "channel" and scales in ((rows,), (rows, 1)):
        return 1, columns
    if strategy == "group" and isinstance(size, int) and size > 0 and scales == (rows, math.ceil(columns / size)):
        return 1, size
    sides = group.get("block_structure")
    if (
        strategy == "block"
        and isinstance(sides, list)
        and len(sides) == 2
        and all(isinstance(s, int) and s for s in sides)
    ):
        height, width = sides
        if scales == (math.ceil(rows / height), math.ceil(columns / width)):
            return height, width
    return None


def _open(weights: CheckpointWeights, module: str, suffix: str, scheme: _Scheme) -> ReadRows:
    height, width = scheme.block
    count, columns = scheme.shape
    grid = (math.ceil(count / height), math.ceil(columns / width))
    scales = checked_scales(weights, module + SCALE).view(grid)
    zeros = _zeros(weights, f"{module}.weight_zero_point", scheme, grid)
    groups = _groups_of_columns(weights, module + INDEX, scheme, grid)
    stored = weights.info(module + suffix).shape[1]

    def spread(values: Tensor, top: int, bottom: int) -> Tensor:
        return values[torch.arange(top, bottom) // height][:, groups]

    def rows(top: int, bottom: int) -> Tensor:
        numbers = weights.read_part(module + suffix, top * stored, (bottom - top) * stored).view(-1, stored)
        if scheme.bits:
            numbers = unpack(numbers, scheme.bits)[:, :columns] - 2 ** (scheme.bits - 1)
        values = numbers.float()
        if zeros is not None:
            values -= spread(zeros, top, bottom)
        return values * spread(scales, top, bottom)

    return rows


def _groups_of_columns(weights: CheckpointWeights, name: str, scheme: _Scheme, grid: tuple[int, int]) -> Tensor:
    """Return the group of each column: in order, unless an index says otherwise."""
    columns, width = scheme.shape[1], scheme.block[1]
    index = weights.read(name).long() if name in weights.tensors else torch.tensor([-1])
    if (index < 0).any():
        return torch.arange(columns) // width
    if index.shape != (columns,) or int(index.max()) >= grid[1]:
        raise unfit(weights, name, f"it names {index.numel()} columns and groups up to {index.max()} of {grid[1]}")
    return index


def stored_values(weights: CheckpointWeights, module: str, shape: StaticShape, bits: int, width: int) -> Tensor:
    """Dequantize a weight of known layout, without zero points, to float32.

    Args:
        weights: The files.
        module: Name of the module in the files.
        shape: Shape of the weight.
        bits: Bits of packed numbers; 0 for numbers in whole bytes.
        width: Columns that share a scale.

    Raises:
        SourceError: A tensor is missing or cannot be used.
    """
    suffix = ".weight_packed" if bits else ".weight"
    reader = partial(_open, weights, module, suffix, _Scheme(bits, shape, (1, width)))
    values, done = torch.empty(math.prod(shape)), 0
    for chunk in Dequantized(module, shape, (module + suffix,), "", reader).values(_CHUNK):
        values[done : done + chunk.numel()] = chunk
        done += chunk.numel()
    return values.view(shape)


def _zeros(weights: CheckpointWeights, name: str, scheme: _Scheme, grid: tuple[int, int]) -> Tensor | None:
    """Read zero points as float32 of the scales' shape; None if there are none."""
    if name not in weights.tensors:
        return None
    zeros = weights.read(name)
    if scheme.bits and zeros.dtype == torch.int32 and zeros.ndim == 2:
        zeros = unpack(zeros.t().contiguous(), scheme.bits)[:, : grid[0]].t() - 2 ** (scheme.bits - 1)
    if zeros.numel() != math.prod(grid):
        raise unfit(weights, name, f"it has shape {list(weights.info(name).shape)} for scales of {list(grid)}")
    return zeros.reshape(grid).float()

"""Weights of a source that are dequantized when they are read, in layouts that artifacts do not keep.

A layout is one file in this folder, with a function `weights_in`, and one row in `METHODS`. The unpacking of words, the
reading of scales and the words for what shares one are here.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vlmbuild.errors import SourceError
from vlmbuild.formats import StaticShape, ranges, unfit
from vlmbuild.util.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vlmbuild.artifact.weights_reader import CheckpointWeights
else:
    torch = LazyModule("torch")

METHODS: Final[dict[str, str]] = {
    "fp8": "vlmbuild.quant.fp8",
    "compressed-tensors": "vlmbuild.quant.compressed_tensors",
    "awq": "vlmbuild.quant.awq",
    "gptq": "vlmbuild.quant.gptq",
}
"""`quant_method` of a config.json -> module that reads such weights."""

ReadRows = Callable[[int, int], "Tensor"]
"""Returns the rows from the first to before the second, float32 [rows, columns]."""


@dataclass(frozen=True, slots=True)
class Dequantized:
    """A weight that is dequantized when it is read.

    Attributes:
        module: Name of its module in the files.
        shape: Shape of the weight, [out, in].
        parts: Names of its tensors, the stored numbers first.
        layout: The layout for people: "4 bits, groups of 128".
        reader: Function that reads what all rows need, and returns a reader of rows. Raises SourceError.
    """

    module: str
    shape: StaticShape
    parts: tuple[str, ...]
    layout: str
    reader: Callable[[], ReadRows]

    def values(self, step: int) -> Iterator[Tensor]:
        """Yield the values, float32, flat, in chunks of at most `step` elements. Raises SourceError."""
        rows, columns = self.reader(), self.shape[1]
        for first, count in ranges(math.prod(self.shape), step):
            top = first // columns
            part = rows(top, -(-(first + count) // columns))
            yield part.flatten()[first - top * columns :][:count]


def is_dequantized(config: object) -> bool:
    """Return whether weights with this `quantization_config` are dequantized when they are read."""
    return isinstance(config, Mapping) and config.get("quant_method") in tuple(METHODS)  # a list has no hash


def dequantized_weights(weights: CheckpointWeights, config: Mapping[str, Any]) -> Iterator[Dequantized]:
    """Yield the weights of a source whose method is in `METHODS`.

    Args:
        weights: The source.
        config: The `quantization_config` of config.json.

    Raises:
        SourceError: They are in a layout that is not read, or contradict the config.
    """
    found: Iterator[Dequantized] = importlib.import_module(METHODS[config["quant_method"]]).weights_in(weights, config)
    for weight in found:
        if min(weight.shape) < 1:
            raise unfit(weights, weight.parts[0], f"its shape is {list(weight.shape)}")
        yield weight


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unpack int32 [rows, words] to int32 [rows, words * 32 / bits]: unsigned numbers, the first in the lowest bits.

    `bits` divides 32: numbers that straddle words are not read.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    numbers: Tensor = (words[..., None] >> shifts) & (2**bits - 1)
    return numbers.flatten(-2)


def checked_scales(weights: CheckpointWeights, name: str) -> Tensor:
    """Read scales as float32. Raises SourceError for another type, and for one that is negative or not finite."""
    dtype = weights.info(name).dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise unfit(weights, name, f"it is {dtype}, and scales are float32, bfloat16 or float16")
    scales = weights.read(name).float()
    if not (torch.isfinite(scales) & (scales >= 0)).all():
        raise SourceError(f"{weights.directory}: a scale in {name} is negative, NaN or infinity. Download it again.")
    return scales


def sharing(shape: StaticShape, block: tuple[int, int]) -> str:
    """Describe for people which weights share a scale."""
    if block == shape:
        return "one scale"
    if block[0] == 1:
        return "one scale a row" if block[1] >= shape[1] else f"groups of {block[1]}"
    return f"blocks of {block[0]} x {block[1]}"


def unread(weights: CheckpointWeights, config: Mapping[str, Any], problem: str) -> SourceError:
    """Make the error for a quantization that is not read."""
    return SourceError(
        f"{weights.directory} is quantized with {config['quant_method']} in a way that is not read: {problem}. Build from the "
        "unquantized checkpoint."
    )

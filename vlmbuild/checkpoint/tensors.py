"""The tensors of a source as the model has them: one for each parameter, plain or quantized with what belongs to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.errors import SourceError
from vlmbuild.families import Family
from vlmbuild.formats import FORMATS, WeightFormat, format_class, ranges
from vlmbuild.quant.bnb_config import check_method
from vlmbuild.quant.dequantized import Dequantized, dequantized_weights, is_dequantized

_CHUNK = 2**22
"""Elements that are compared at a time."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A parameter in a source.

    Attributes:
        name: Name of its tensor in the files; for a quantized parameter, of the packed weight.
        shape: Shape of the parameter.
        dtype: Dtype of the parameter, once it is dequantized.
        nbytes: Bytes that its tensors take.
        format: Format of a quantized parameter; None for a plain tensor, and for one that is dequantized when it is read.
        parts: Names of all its tensors, `name` first.
        dequantized: The parameter if it is dequantized when it is read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    format: WeightFormat | None = None
    parts: tuple[str, ...] = ()
    dequantized: Dequantized | None = None

    @property
    def module(self) -> str:
        """Name of its module in the files."""
        return self.name.removesuffix(".weight") if self.dequantized is None else self.dequantized.module

    def values(self, weights: CheckpointWeights, dtype: torch.dtype, step: int) -> Iterator[Tensor]:
        """Yield the values, flat, in chunks of at most `step` elements and in memory of their own.

        Args:
            weights: The source.
            dtype: Dtype for formats that store none; other values have the dtype of the source.
            step: A multiple of `WeightFormat.chunk_unit`.

        Raises:
            SourceError: A tensor cannot be read.
        """
        if self.format is not None:
            yield from self.format.decode(weights, self.module, self.shape, dtype, step)
            return
        if self.dequantized is not None:
            yield from self.dequantized.values(step)
            return
        for first, count in ranges(math.prod(self.shape), step):
            yield weights.read_part(self.name, first, count)

    def whole(self, weights: CheckpointWeights, dtype: torch.dtype) -> Tensor:
        """Return all values in memory of their own. The arguments and errors are those of `values`."""
        return torch.cat(list(self.values(weights, dtype, _CHUNK))).view(self.shape)


def source_tensors(weights: CheckpointWeights, family: Family, config: Mapping[str, Any]) -> dict[str, SourceTensor]:
    """Return every parameter of a source by module name. `config` holds the values of config.json.

    Reads headers, and the states and shapes of packed weights (some hundred bytes each).

    Raises:
        SourceError: It is quantized in an unknown layout, or the parts of a weight do not fit each other.
    """
    tensors: dict[str, SourceTensor] = {}
    if config.get("quantization_config") is not None:
        quantization = check_method(config["quantization_config"], str(weights.directory))
        if is_dequantized(quantization):
            for weight in dequantized_weights(weights, quantization):
                tensors[family.module_name(f"{weight.module}.weight")] = _dequantized_tensor(weights, weight)
        else:
            found = _packed_tensors(weights, quantization)
            tensors = {family.module_name(tensor.name): tensor for tensor in found}
        if not tensors:
            raise SourceError(
                f"{weights.directory}: config.json has a quantization_config, but no weight is quantized. Remove it to build "
                "from these weights, or get the quantized ones."
            )
    taken = {part for tensor in tensors.values() for part in tensor.parts}
    for name, info in weights.tensors.items():
        if name not in taken:
            tensors[family.module_name(name)] = SourceTensor(name, info.shape, info.dtype, info.nbytes, None, (name,))
    return tensors


def _packed_tensors(weights: CheckpointWeights, config: Mapping[str, Any]) -> Iterator[SourceTensor]:
    """Yield the weights in bitsandbytes' formats, which artifacts keep. Each has a tensor beside it that marks its format."""
    classes = {cls.marker: cls for cls in map(format_class, FORMATS) if cls.marker}
    for name in weights.tensors:
        marker = next((suffix for suffix in classes if name.endswith(suffix)), None)
        if marker is not None:
            module = name.removesuffix(marker)
            form, dtype, shape, suffixes = classes[marker].check(weights, module, config)
            yield _quantized_tensor(weights, tuple(module + suffix for suffix in suffixes), shape, dtype, form)


def _dequantized_tensor(weights: CheckpointWeights, weight: Dequantized) -> SourceTensor:
    nbytes = sum(weights.tensors[part].nbytes for part in weight.parts)
    return SourceTensor(weight.parts[0], weight.shape, torch.float32, nbytes, None, weight.parts, weight)


def _quantized_tensor(
    weights: CheckpointWeights,
    parts: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    form: WeightFormat,
) -> SourceTensor:
    nbytes = sum(weights.tensors[part].nbytes for part in parts)
    return SourceTensor(parts[0], shape, dtype, nbytes, form, parts)


def same_values(weights: CheckpointWeights, one: SourceTensor, other: SourceTensor) -> bool:
    """Compare two parameters, a chunk at a time; quantized ones differ from everything."""
    if one.shape != other.shape or one.format is not None or other.format is not None:
        return False
    chunks = zip(*(tensor.values(weights, tensor.dtype, _CHUNK) for tensor in (one, other)), strict=True)
    return all(torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.float(), b.float()) for a, b in chunks)

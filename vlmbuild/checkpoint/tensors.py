"""The tensors of a source as the model has them: one for each parameter, plain or quantized with what belongs to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.errors import SourceError
from vlmbuild.families import Family
from vlmbuild.formats import FORMATS, WeightFormat, format_class, ranges
from vlmbuild.ir.linear_layers import linear_layers
from vlmbuild.ir.program import Program
from vlmbuild.quant.bnb_config import MIXED, announced_format, check_method, is_skipped


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A parameter in a source.

    Attributes:
        name: Name of its tensor in the files; for a quantized parameter, of the packed weight.
        shape: Shape of the parameter.
        dtype: Dtype of the parameter, once it is dequantized.
        nbytes: Bytes that its tensors take.
        format: Format of a quantized parameter; None for a plain tensor.
        parts: Names of all its tensors, `name` first.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    format: WeightFormat | None = None
    parts: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Name of its module in the files."""
        return self.name.removesuffix(".weight")

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
        for first, count in ranges(math.prod(self.shape), step):
            yield weights.read_part(self.name, first, count)


def source_tensors(weights: CheckpointWeights, family: Family, config: Mapping[str, Any]) -> dict[str, SourceTensor]:
    """Return every parameter of a source by module name. `config` holds the values of config.json.

    Reads headers, and the states of 4-bit weights (some hundred bytes each).

    Raises:
        SourceError: It is quantized in an unknown layout, or the parts of a weight do not fit each other.
    """
    tensors: dict[str, SourceTensor] = {}
    if config.get("quantization_config") is not None:
        quantization = check_method(config["quantization_config"], str(weights.directory))
        classes = {cls.marker: cls for cls in map(format_class, FORMATS) if cls.marker}
        for name in weights.tensors:
            marker = next((suffix for suffix in classes if name.endswith(suffix)), None)
            if marker is not None:
                tensor = _quantized(weights, name.removesuffix(marker), classes[marker], quantization)
                tensors[family.module_name(tensor.name)] = tensor
    taken = {part for tensor in tensors.values() for part in tensor.parts}
    for name, info in weights.tensors.items():
        if name not in taken:
            tensors[family.module_name(name)] = SourceTensor(name, info.shape, info.dtype, info.nbytes, None, (name,))
    return tensors


def _quantized(
    weights: CheckpointWeights, module: str, form: type[WeightFormat], config: Mapping[str, Any]
) -> SourceTensor:
    stored = form.check(weights, module, config)
    parts = tuple(module + suffix for suffix in stored.suffixes)
    nbytes = sum(weights.tensors[part].nbytes for part in parts)
    return SourceTensor(parts[0], stored.shape, stored.dtype, nbytes, stored.format, parts)


def stored_formats(tensors: Mapping[str, SourceTensor]) -> dict[str, WeightFormat]:
    """Return module -> format of the quantized layers."""
    return {
        name.removesuffix(".weight"): tensor.format for name, tensor in tensors.items() if tensor.format is not None
    }


def announced_formats(
    family: Family, values: Mapping[str, Any], program: Program, where: str
) -> Mapping[str, WeightFormat]:
    """Return the formats of a quantized source's linear layers, by module name, from config.json alone.

    Raises:
        SourceError: Its weights have formats that the config cannot tell apart.
    """
    config = values.get("quantization_config")
    if config is None:
        return {}
    if config.get("quant_method") == MIXED:
        raise SourceError(
            f"{where} has 4-bit and 8-bit weights, and only they can tell which is which. Put them beside config.json."
        )
    names, skipped = published_name(family), config.get("llm_int8_skip_modules") or ["lm_head"]
    form = announced_format(config)
    return {
        layer.module: form
        for layer in linear_layers(program)
        if not layer.shared and not is_skipped(layer.module, skipped) and not is_skipped(names(layer.module), skipped)
    }


def published_name(family: Family) -> Callable[[str], str]:
    """Return a function from module names to names in published checkpoints."""
    return lambda module: family.stored_name(f"{module}.weight").removesuffix(".weight")

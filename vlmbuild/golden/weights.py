"""Weights of artifacts for the reference run, by target: as stored, so that quantization and faults are told apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.families import Family
from vlmbuild.ir.program import Region, join
from vlmbuild.measure.reference import SlotWeights
from vlmbuild.runtime.bind import instance_tensors
from vlmbuild.runtime.gguf.weights import GgufWeights
from vlmbuild.runtime.onnx.weights import OnnxWeights
from vlmbuild.runtime.torch.region import is_compute


class TrainableWeights:
    """Weights of a trainable artifact; its graphs compute with quantized ones as they are."""

    def __init__(self, directory: Path, family: Family) -> None:
        self._weights, self._family = CheckpointWeights(directory), family

    def slots(self, region: Region, instance: str, constants: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the tensors of an instance's slots, in float32 where they follow the compute dtype."""
        held = {**dict(instance_tensors(region, instance, self._family, self._weights)), **constants}
        tensors = [held[join(instance, slot.name)] for slot in region.slots]
        return tuple(x.float() if is_compute(slot) else x for x, slot in zip(tensors, region.slots, strict=True))


WEIGHTS: dict[str, Callable[[Path, Family], SlotWeights]] = {
    "trainable": TrainableWeights,
    "aoti": TrainableWeights,
    "compressed-tensors": TrainableWeights,  # its formats dequantize as they are read
    "onnx": lambda directory, _: OnnxWeights(directory),
    "gguf": lambda directory, _: GgufWeights(directory),
}
"""Target -> (artifact, family) -> its weights."""

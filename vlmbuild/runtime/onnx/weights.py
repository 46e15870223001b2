"""Weights of an artifact's ONNX models under the program's names: plain ones mapped, packed ones dequantized on demand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

from vlmbuild.errors import IncompatibleError
from vlmbuild.formats import PackedWeight
from vlmbuild.ir.program import Region, join
from vlmbuild.quant.ort_matmul import unpacked
from vlmbuild.runtime.onnx.session import FOLDER, check_data_files
from vlmbuild.runtime.onnx.sizes import LOOKUP, PACKED, WEIGHT_INPUT


@dataclass(frozen=True, slots=True)
class _Location:
    file: Path
    dtype: Any
    shape: tuple[int, ...]
    offset: int
    length: int


class OnnxWeights:
    """Reads the weights of all models under a directory's `onnx/`. Raises IncompatibleError when one is not readable.

    Attributes:
        packed: Module name -> storage of a quantized parameter.
        packing: Stems of the models with such parameters.
        stems: Stems of all models.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._locations: dict[str, _Location] = {}
        self.packed: dict[str, PackedWeight] = {}
        self.stems: set[str] = set()
        self.packing: set[str] = set()
        for file in sorted((directory / FOLDER).glob("*.onnx")):
            check_data_files(file)
            self._read_model(file)

    def tensor(self, name: str) -> Tensor:
        """Return a parameter by module name, in float32 if it is quantized.

        Raises:
            IncompatibleError: No model has it.
        """
        if name not in self._locations:
            raise IncompatibleError(
                f"The ONNX models of {self.directory} lack {name}, which their program needs. Build it again."
            )
        packed = self.packed.get(name)
        if packed is None:
            return self._stored(name)
        suffixes = PACKED[packed.operator]
        return unpacked(packed, {s: self._stored(name + s) for s in suffixes if name + s in self._locations})

    def slots(self, region: Region, instance: str, constants: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the tensors of an instance's slots, in float32."""
        names = [join(instance, slot.name) for slot in region.slots]
        return tuple(constants[name] if name in constants else self.tensor(name).float() for name in names)

    def _stored(self, name: str) -> Tensor:
        location = self._locations[name]
        mapped = np.memmap(location.file, location.dtype, "c", location.offset, location.shape)
        tensor: Tensor = torch.from_numpy(np.asarray(mapped))
        return tensor

    def _read_model(self, file: Path) -> None:
        model = onnx.load(file, load_external_data=False)
        self.stems.add(file.stem)
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                where = {entry.key: entry.value for entry in tensor.external_data}
                dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
                location = _Location(
                    file.parent / where["location"],
                    dtype,
                    tuple(tensor.dims),
                    int(where["offset"]),
                    int(where["length"]),
                )
                self._locations[tensor.name] = location
        for node in model.graph.node:
            attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
            if node.op_type == LOOKUP:
                attributes = {entry.key: int(entry.value) for entry in node.metadata_props}
            if node.op_type in PACKED and attributes:
                packed = PackedWeight(node.op_type, attributes, {})
                # A product says more than a lookup of the same weight; the decoder's file comes before the embeddings'.
                self.packed.setdefault(node.input[WEIGHT_INPUT[node.op_type]], packed)
                self.packing.add(file.stem)

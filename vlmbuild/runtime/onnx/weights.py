"""The weights of an artifact's ONNX models as the program reads them: plain ones mapped, packed ones dequantized on demand."""

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
from vlmbuild.runtime.onnx.sizes import PACKED


@dataclass(frozen=True, slots=True)
class _Place:
    file: Path
    dtype: Any
    shape: tuple[int, ...]
    offset: int
    length: int


class OnnxWeights:
    """Reads the weights of all models under a directory's `onnx/`. Raises IncompatibleError when one is not readable.

    Attributes:
        packed: Module name -> how a quantized parameter is stored.
        packing: Stems of the models that have such parameters.
        stems: Of all models.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._places: dict[str, _Place] = {}
        self.packed: dict[str, PackedWeight] = {}
        self.stems: set[str] = set()
        self.packing: set[str] = set()
        for file in sorted((directory / FOLDER).glob("*.onnx")):
            check_data_files(file)
            self._read_model(file)

    def tensor(self, name: str) -> Tensor:
        """A parameter by module name, in float32 if it is quantized, else in its dtype.

        Raises:
            IncompatibleError: No model has it.
        """
        if name not in self._places:
            raise IncompatibleError(f"The ONNX models of {self.directory} lack {name}, which their program needs.")
        packed = self.packed.get(name)
        if packed is None:
            return self._stored(name)
        suffixes = PACKED[packed.operator]
        return unpacked(packed, {s: self._stored(name + s) for s in suffixes if name + s in self._places})

    def slots(self, region: Region, instance: str, constants: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What an instance's slots hold, in float32."""
        names = [join(instance, slot.name) for slot in region.slots]
        found = (constants[name] if name in constants else self.tensor(name) for name in names)
        return tuple(tensor.float() for tensor in found)

    def _stored(self, name: str) -> Tensor:
        place = self._places[name]
        mapped = np.memmap(place.file, place.dtype, "c", place.offset, place.shape)
        tensor: Tensor = torch.from_numpy(np.asarray(mapped))
        return tensor

    def _read_model(self, file: Path) -> None:
        model = onnx.load(file, load_external_data=False)
        self.stems.add(file.stem)
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                where = {entry.key: entry.value for entry in tensor.external_data}
                dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
                place = _Place(
                    file.parent / where["location"],
                    dtype,
                    tuple(tensor.dims),
                    int(where["offset"]),
                    int(where["length"]),
                )
                self._places[tensor.name] = place
        for node in model.graph.node:
            if node.op_type in PACKED:
                attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
                self.packed[node.input[1]] = PackedWeight(node.op_type, attributes, {})
                self.packing.add(file.stem)

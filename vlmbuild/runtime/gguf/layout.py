"""Which tensors of which GGUF file a program's parameters become, and the way back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmbuild.errors import SourceError
from vlmbuild.families import Family
from vlmbuild.families.gguf import GgufModel, GgufPart
from vlmbuild.ir.program import SourceWeight
from vlmbuild.quant.gguf import gguf_package

MODEL, TOWER = "model.gguf", "mmproj.gguf"
FILES = (MODEL, TOWER)
ENGINE_FILE = "llama.cpp.json"
"""How llama.cpp is to be started, and what its marker of an image replaces."""
_NUMBERED = 3
"""Layers of a projector, which the package's table numbers as blocks."""
_ENDS = (".weight", ".bias")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        file: Name of the file.
        name: Its name there.
        shape: Its shape, rows first.
        parameter: Module name of the parameter that it is cut from.
        source_shape: Shape of the parameter.
        part: The cut.
    """

    file: str
    name: str
    shape: tuple[int, ...]
    parameter: str
    source_shape: tuple[int, ...]
    part: GgufPart

    @property
    def chunk_unit(self) -> int:
        """The number of the parameter's values that `cut` needs together."""
        row = torch.Size(self.source_shape[1:]).numel()
        return row * max(1, self.part.head_rows)

    def cut(self, rows: Tensor, first: int) -> Tensor:
        """Cut rows of the parameter, of which `first` is the number of the first: float32 rows of the tensor, maybe none."""
        if self.part.rows is not None:
            start, end = (max(0, bound - first) for bound in self.part.rows)
            rows = rows[start:end]
        if self.part.frame is not None:
            rows = rows[:, :, self.part.frame]
        if self.part.head_rows:
            rows = rows.unflatten(0, (-1, 2, self.part.head_rows // 2)).transpose(1, 2).flatten(0, 2)
        return rows + self.part.added if self.part.added else rows

    def restore(self, values: Tensor, parameter: Tensor) -> None:
        """Put the tensor's float32 values back where `cut` took them from."""
        part = self.part
        values = values.reshape(self.shape)
        if part.added:
            values = values - part.added
        if part.head_rows:
            values = values.unflatten(0, (-1, part.head_rows // 2, 2)).transpose(1, 2).flatten(0, 2)
        place = parameter if part.rows is None else parameter[slice(*part.rows)]
        place = place if part.frame is None else place[:, :, part.frame]
        place.copy_(values.view(place.shape))


def gguf_tensors(weights: Iterable[SourceWeight], family: Family, model: GgufModel) -> list[GgufTensor]:
    """List the tensors of both files, in the order of a program's weights. Raises SourceError for one that llama.cpp lacks."""
    gguf = gguf_package()
    blocks = {MODEL: model.text["block_count"], TOWER: model.vision["vision_block_count"]}
    archs = {MODEL: gguf.MODEL_ARCH[model.arch], TOWER: gguf.MODEL_ARCH.MMPROJ}
    tables = {file: gguf.get_tensor_name_map(archs[file], max(blocks[file], _NUMBERED)) for file in FILES}
    found = []
    for parameter, shape, _ in weights:
        role = family.role(parameter)
        in_tower = role in ("vision", "projector")
        name = _tower_name(family, model, parameter) if in_tower else _text_name(family, parameter)
        for part in model.parts(name, shape) or (GgufPart(name),):
            file = TOWER if (in_tower if part.vision is None else part.vision) else MODEL
            found.append(
                GgufTensor(file, _file_name(tables[file], part, parameter), _shape(shape, part), parameter, shape, part)
            )
    return sorted(found, key=lambda tensor: FILES.index(tensor.file))


def _tower_name(family: Family, model: GgufModel, parameter: str) -> str:
    name = family.stored_name(parameter)
    for prefix, known in model.table_names.items():
        if name.startswith(prefix):
            return known + name.removeprefix(prefix)
    return name


def _text_name(family: Family, parameter: str) -> str:
    prefix = family.language_prefix
    return f"model.{parameter.removeprefix(prefix)}" if parameter.startswith(prefix) else parameter


def _file_name(table: Any, part: GgufPart, parameter: str) -> str:
    gguf = gguf_package()
    if part.kind:
        return str(gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[part.kind]].format(bid=part.block)) + part.name
    name = table.get_name(part.name, try_suffixes=_ENDS)
    if name is None:
        raise SourceError(f"{parameter} has no place in a GGUF file: llama.cpp's model lacks it. Choose --target onnx.")
    return str(name)


def _shape(shape: tuple[int, ...], part: GgufPart) -> tuple[int, ...]:
    if part.rows is not None:
        count = part.rows[1] - part.rows[0]
        shape = (count, *shape[1:]) if not part.copied else shape[1:]
    return shape if part.frame is None else (*shape[:2], *shape[3:])

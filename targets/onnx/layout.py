"""Where each weight lies in the data files beside the graphs: decided before any is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from vlmbuild.formats import Buffer, PackedWeight, WeightFormat
from vlmbuild.ir.program import COMPUTE_DTYPE, Program, Region, Slot, join
from vlmbuild.ops import OPERATORS
from vlmbuild.targets.onnx.graph_builder import GraphBuilder, Stored

_PAGE, _LINE = 4096, 64
"""Large tensors begin on a page, so that a runtime may map them; small ones on a cache line."""


def packed_formats(program: Program) -> dict[str, tuple[WeightFormat, tuple[int, ...]]]:
    """Map the module names of quantized parameters to (format, shape)."""
    return {
        join(instance, recipe.source): (recipe.format, recipe.shape)
        for region in program.regions.values()
        for instance in region.instances
        for recipe in region.recipes
    }


@dataclass(slots=True)
class DataFile:
    """One data file.

    Attributes:
        location: Its name.
        parameters: Module name -> its tensors by suffix, in the order of the file.
        size: Size in bytes.
    """

    location: str
    parameters: dict[str, dict[str, Stored]] = field(default_factory=dict)
    size: int = 0

    def place(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Stored:
        """Reserve the next free range for a tensor."""
        length = math.prod(shape) * dtype.itemsize
        unit = _PAGE if length >= _PAGE else _LINE
        offset = -(-self.size // unit) * unit
        self.size = offset + length
        return Stored(dtype, shape, self.location, offset, length)


class Weights:
    """The parameters of a program as graphs read them.

    Attributes:
        packed: Module name -> how a quantized parameter is stored.
    """

    def __init__(self, program: Program, constants: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._constants = constants
        self._dtype = dtype
        self.packed: dict[str, PackedWeight] = {
            name: form.onnx_weight(shape, dtype, name) for name, (form, shape) in packed_formats(program).items()
        }

    def declare(
        self, builder: GraphBuilder, data: DataFile, region: Region, instance: str, nodes: frozenset[Node]
    ) -> dict[Node, str]:
        """Make the needed slots of an instance initializers of a graph: placeholder -> name."""
        return {
            node: self._declare_slot(builder, data, join(instance, slot.name), slot, _is_looked_up(node, nodes))
            for node, slot in region.slot_nodes().items()
            if node in nodes
        }

    def _declare_slot(self, builder: GraphBuilder, data: DataFile, name: str, slot: Slot, looked_up: bool) -> str:
        if slot.kind == "constant":
            dtype = self._dtype if slot.dtype == COMPUTE_DTYPE else slot.dtype
            return builder.constant(self._constants[name], dtype)
        if name not in data.parameters:
            data.parameters[name] = self._place(data, name, slot, looked_up)
        for suffix, stored in data.parameters[name].items():
            builder.weight(name + suffix, stored)
        return name

    def _place(self, data: DataFile, name: str, slot: Slot, looked_up: bool) -> dict[str, Stored]:
        if name in self.packed:
            parts = self.packed[name].parts
            if looked_up:  # the same bytes with an axis of rows
                parts = {s: part if s == "" else _in_rows(part, slot.shape[0]) for s, part in parts.items()}
            return {suffix: data.place(*part) for suffix, part in parts.items()}
        return {"": data.place(self._dtype if slot.dtype == COMPUTE_DTYPE else slot.dtype, slot.shape)}


def _is_looked_up(slot: Node, nodes: frozenset[Node]) -> bool:
    """Return whether the needed nodes look rows of a quantized slot up; no model both does that and multiplies by it."""
    operator = OPERATORS["embedding_packed"].overload
    return any(user.target is operator and user in nodes for user in slot.users)


def _in_rows(part: Buffer, rows: int) -> Buffer:
    return Buffer(part.dtype, (rows, math.prod(part.shape) // rows))

"""FLOPs and bytes of a region as formulas of the program's dimensions.

FLOPs count matrix products, convolutions and attention, two for a multiply and an add; everything else is bound by memory.
Attention counts every pair of a packed row, which is its upper bound: one segment, or each row's window. Bytes are read and
written by each operator as if it ran alone, so a lost fusion shows; views move nothing, and gathers read the rows that they
return.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vlmbuild.ir.dims import Dim, Size
from vlmbuild.ir.printer import dataflow_order, target_name
from vlmbuild.ir.program import COMPUTE_DTYPE, Region
from vlmbuild.ops import ATTENTION
from vlmbuild.ops.attention.op import gather_masks

aten = torch.ops.aten
_GATHERS = (aten.embedding.default, aten.index.Tensor)
_FREE = (aten.sym_size.int,)


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of one instance of a region.

    Attributes:
        flops, bytes: Formulas: "24576*sequence**2 + 93585408*sequence".
        operators: How often each operator occurs.
    """

    flops: str
    bytes: str
    operators: dict[str, int]


def region_cost(region: Region, itemsize: int) -> Cost:
    """Count a region whose nodes have shapes.

    Args:
        region: From a captured program, or one whose shapes were propagated.
        itemsize: Bytes of the compute dtype.
    """
    count = _NodeCost(region.dimensions, itemsize)
    flops = moved = Dim(())
    operators: Counter[str] = Counter()
    for node in dataflow_order(region):
        operators[target_name(node)] += 1
        flops += count.flops(node)
        moved += count.bytes(node)
    return Cost(str(flops.ordered()), str(moved.ordered()), dict(sorted(operators.items())))


@dataclass(frozen=True, slots=True)
class _NodeCost:
    dimensions: Mapping[str, str]
    itemsize: int

    def flops(self, node: Node) -> Size:
        name = target_name(node)
        if node.target in ATTENTION:
            query, key = (self._shape(node.args[index]) for index in (0, 1))
            batch, heads, length, width = query
            seen = key[2] if (window := attention_window(node)) is None else window
            return 4 * batch * heads * length * seen * width
        if name.startswith("aten.conv"):
            return 2 * _product(self._shape(node)) * _product(self._shape(node.args[1])[1:])
        if name.partition(".")[2].startswith("linear"):
            return 2 * _product(self._shape(node)) * self._shape(node.args[0])[-1]
        return 0

    def bytes(self, node: Node) -> Size:
        """Count the bytes that an operator reads and writes when it runs alone."""
        if node.target in _FREE or node.op != "call_function" or _is_view(node):
            return 0
        written = self._nbytes(node)
        gathers = node.target in _GATHERS
        read = node.all_input_nodes[1:] if gathers else node.all_input_nodes
        return sum((self._nbytes(other) for other in read), start=2 * written if gathers else written)

    def _nbytes(self, node: Node) -> Dim:
        value = node.meta.get("val")
        total = Dim(())
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if isinstance(tensor, torch.Tensor):
                size = self.itemsize if tensor.dtype == COMPUTE_DTYPE else tensor.dtype.itemsize
                total += size * _product(self._sizes(tensor))
        return total

    def _shape(self, node: Any) -> list[Size]:
        return self._sizes(_tensor(node))

    def _sizes(self, tensor: torch.Tensor) -> list[Size]:
        return [size if isinstance(size, int) else Dim.of(size, self.dimensions) for size in tensor.shape]


def attention_window(node: Node) -> int | None:
    """Return the number of keys that a query of an attention node sees at most; None is all."""
    window = gather_masks(node.args)[3].window
    return None if window is None else int(window)


def _product(sizes: list[Size]) -> Dim:
    total = Dim(((1, ()),))
    for size in sizes:
        total *= size
    return total


def _is_view(node: Node) -> bool:
    """Return whether the result shares the input's memory: getitem, and operators whose schema returns an alias."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    if node.target is aten.to.dtype:
        return _tensor(node.args[0]).dtype == _tensor(node).dtype
    returned = node.target._schema.returns
    return bool(returned) and returned[0].alias_info is not None


def _tensor(node: Any) -> torch.Tensor:
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value

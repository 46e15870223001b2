"""FLOPs and bytes of a region as formulas of the program's dimensions.

FLOPs are those of matrix products, convolutions and attention, two for a multiply and an add; the rest is bound by memory.
Attention counts every pair of a packed row, which is its upper bound: one segment. Bytes are what each operator reads and
writes when it runs alone, so a lost fusion shows; views move nothing, and gathers read the rows that they return.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx import Node

from vlmbuild.ir.printer import dataflow_order, target_name
from vlmbuild.ir.program import COMPUTE_DTYPE, Region

aten = torch.ops.aten
_GATHERS = (aten.embedding.default, aten.index.Tensor)
_FREE = (aten.sym_size.int,)
_ATTENTION = "vlmbuild.attention"


@dataclass(frozen=True, slots=True)
class Cost:
    """What one instance of a region costs: formulas, and how often each operator occurs."""

    flops: str
    bytes: str
    operators: dict[str, int]


def region_cost(region: Region, itemsize: int) -> Cost:
    """Count a region whose nodes have shapes.

    Args:
        region: Of a captured program, or of one whose shapes were propagated.
        itemsize: Bytes of the compute dtype.
    """
    flops: Any = sympy.Integer(0)
    moved: Any = sympy.Integer(0)
    operators: Counter[str] = Counter()
    for node in dataflow_order(region):
        operators[target_name(node)] += 1
        flops += node_flops(node)
        moved += node_bytes(node, itemsize)
    names = region.dimensions
    return Cost(formula(flops, names), formula(moved, names), dict(sorted(operators.items())))


def node_flops(node: Node) -> Any:
    """FLOPs of an operator."""
    name = target_name(node)
    if name.startswith(_ATTENTION):
        query, key = (_shape(node.args[place]) for place in (0, 1))
        batch, heads, length, width = query
        return 4 * batch * heads * length * key[2] * width
    if name.startswith("aten.conv"):
        return 2 * _count(node) * math.prod(_shape(node.args[1])[1:])
    if name.partition(".")[2].startswith("linear"):
        return 2 * _count(node) * _shape(node.args[0])[-1]
    return sympy.Integer(0)


def node_bytes(node: Node, itemsize: int) -> Any:
    """Bytes that an operator reads and writes when it runs alone."""
    if node.target in _FREE or node.op != "call_function" or _is_view(node):
        return sympy.Integer(0)
    written = _nbytes(node, itemsize)
    if node.target in _GATHERS:
        return 2 * written + sum(_nbytes(other, itemsize) for other in node.all_input_nodes[1:])
    return written + sum(_nbytes(other, itemsize) for other in node.all_input_nodes)


def formula(expression: Any, names: dict[str, str]) -> str:
    """A polynomial with its largest powers first: "24576*sequence**2 + 93585408*sequence"."""
    renamed = {symbol: sympy.Symbol(names.get(str(symbol), str(symbol))) for symbol in expression.free_symbols}
    expanded = sympy.expand(sympy.sympify(expression).subs(renamed))
    terms = sorted(sympy.Add.make_args(expanded), key=lambda term: (-_degree(term), str(term)))
    return " + ".join(str(term) for term in terms)


def _degree(term: Any) -> int:
    return int(sum(power for power in term.as_powers_dict().values() if power.is_number)) if term.free_symbols else 0


def _is_view(node: Node) -> bool:
    """Whether the result shares the input's memory: getitem, and what the schema says returns an alias."""
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


def _shape(node: Any) -> list[Any]:
    return [_size(size) for size in _tensor(node).shape]


def _size(size: int | torch.SymInt) -> Any:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _count(node: Any) -> Any:
    return math.prod(_shape(node), start=sympy.Integer(1))


def _nbytes(node: Node, itemsize: int) -> Any:
    value = node.meta.get("val")
    tensors = value if isinstance(value, list | tuple) else [value]
    total: Any = sympy.Integer(0)
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            size = itemsize if tensor.dtype == COMPUTE_DTYPE else tensor.dtype.itemsize
            total += size * math.prod((_size(one) for one in tensor.shape), start=sympy.Integer(1))
    return total

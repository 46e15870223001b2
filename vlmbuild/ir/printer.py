"""Graphs as text, for people and for digests: a renamed or reordered graph prints the same.

Nodes are numbered in dataflow order (each one just before its first use, seen from the output), placeholders print by slot
name or as `in0, in1, ...`, and symbolic sizes by the names of the program's dimensions.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.fx import Node

from vlmbuild.ir.dims import size_text
from vlmbuild.ir.program import COMPUTE_DTYPE, Program, Region, Slot, Variant

_SHORT_DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "b8",
    COMPUTE_DTYPE: "compute",
}
_LARGEST_INT = 2**63 - 1


def dataflow_order(region: Region) -> list[Node]:
    """Return the region's computing nodes in the order of a depth-first walk from its outputs."""
    ordered: dict[Node, None] = {}

    def visit(root: Node) -> None:
        stack = [(root, iter(root.all_input_nodes))]
        while stack:
            node, inputs = stack[-1]
            waiting = next((other for other in inputs if other not in ordered and other.op != "placeholder"), None)
            if waiting is not None:
                stack.append((waiting, iter(waiting.all_input_nodes)))
                continue
            stack.pop()
            if node.op not in ("placeholder", "output"):
                ordered[node] = None

    visit(region.graph.graph.output_node())
    return list(ordered)


def region_text(region: Region, *, shapes: bool = True) -> str:
    """Print a region's graph, one node a line, with shapes where nodes have them."""
    printer = _Printer(region.dimensions, shapes)
    lines = []
    for index, node in enumerate(region.placeholders()):
        if index < len(region.slots):
            slot = region.slots[index]
            printer.names[node] = slot.name
            lines.append(f"  {_slot_text(slot)}")
        else:
            printer.names[node] = f"in{index - len(region.slots)}"
            lines.append(f"  {printer.names[node]}{printer.type_of(node)}")
    for node in dataflow_order(region):
        printer.names[node] = f"%{len(printer.names) - len(region.placeholders())}"
        lines.append(f"  {printer.names[node]}{printer.type_of(node)} = {printer.call(node)}")
    lines.append(f"  return {printer.value(region.results())}")
    return "\n".join(lines)


def digest(region: Region, *, shapes: bool = True) -> str:
    """Compute the SHA-256 (hex) of the region's text. Without shapes it equals that of a stored program, which has none."""
    return hashlib.sha256(region_text(region, shapes=shapes).encode()).hexdigest()


def program_text(program: Program) -> str:
    """Print a program: each variant's calls, then each region once. Size does not grow with depth."""
    parts = [f"program {program.family}"]
    parts += [f"variant {name}\n{variant_text(variant)}" for name, variant in sorted(program.variants.items())]
    for name, region in program.regions.items():
        count = f" x {len(region.instances)}" if region.instances != ("",) else ""
        parts.append(f"region {name}{count}\n{region_text(region)}")
    return "\n\n".join(parts) + "\n"


def variant_text(variant: Variant) -> str:
    """Print a variant's inputs and calls; successive calls of one region print once with their count."""
    lines = [
        f"  {entry.name}: {_SHORT_DTYPES[entry.dtype]}[{', '.join(map(str, entry.shape))}]" for entry in variant.inputs
    ]
    calls = list(variant.calls)
    while calls:
        run = 1
        while run < len(calls) and calls[run].region == calls[0].region:
            run += 1
        first, last = calls[0], calls[run - 1]
        repeat = f" x {run}" if run > 1 else ""
        lines.append(f"  {', '.join(last.outputs)} = {first.region}({', '.join(first.inputs)}){repeat}")
        calls = calls[run:]
    lines.append(f"  return {', '.join((variant.output, *variant.presents))}")
    return "\n".join(lines)


def _slot_text(slot: Slot) -> str:
    sizes = ", ".join(map(str, slot.shape))
    return f"{slot.name}: {_SHORT_DTYPES[slot.dtype]}[{sizes}] {slot.kind} {slot.role}"


class _Printer:
    def __init__(self, dimensions: dict[str, str], shapes: bool) -> None:
        self.dimensions = dimensions
        self.shapes = shapes
        self.names: dict[Node, str] = {}

    def call(self, node: Node) -> str:
        arguments = [self.value(argument) for argument in node.args]
        arguments += [f"{key}={self.value(value)}" for key, value in sorted(node.kwargs.items())]
        return f"{target_name(node)}({', '.join(arguments)})"

    def value(self, value: Any) -> str:
        if isinstance(value, Node):
            return self.names[value]
        if isinstance(value, list | tuple):
            return f"[{', '.join(self.value(item) for item in value)}]"
        if isinstance(value, torch.dtype):
            return _SHORT_DTYPES.get(value, str(value))
        if value == _LARGEST_INT and not isinstance(value, bool | float):
            return "end"
        return repr(value)

    def type_of(self, node: Node) -> str:
        value = node.meta.get("val")
        if not self.shapes or not isinstance(value, torch.Tensor):
            return ""
        sizes = ", ".join(size_text(size, self.dimensions) for size in value.shape)
        return f": {_SHORT_DTYPES.get(value.dtype, str(value.dtype))}[{sizes}]"


def short_dtype(dtype: torch.dtype) -> str:
    """Abbreviate a dtype: "f32", "i64", "compute" for the dtype that is chosen later."""
    return _SHORT_DTYPES.get(dtype, str(dtype))


def target_name(node: Node) -> str:
    """Name the operator of a node: "aten.linear.default", "vlmbuild.attention.default", "getitem"."""
    target = node.target
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))

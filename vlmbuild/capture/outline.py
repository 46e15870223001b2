"""Outline repeated blocks: from one long graph per variant to regions that are called, one graph for all equal blocks.

Blocks are found by `nn_module_stack` (a numbered child of a `ModuleList`), the cut itself is
`torch.fx.passes.split_module`. Everything between blocks becomes a region of its own with the single instance "". The last
product, which makes the logits, is the last region, so that a loss can be taken of some tokens, a few at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.fx.passes.split_module import split_module

from vlmbuild.capture.dedup_blocks import REPEAT
from vlmbuild.capture.export import Trace
from vlmbuild.errors import CaptureError
from vlmbuild.families import Family
from vlmbuild.ir.dims import Dim, Shape
from vlmbuild.ir.printer import region_text
from vlmbuild.ir.program import COMPUTE_DTYPE, Call, Geometry, Program, Region, Slot, Variant, join, returned_nodes
from vlmbuild.rewrite.simplify import inline_no_grad
from vlmbuild.util.gc_paused import gc_paused

aten = torch.ops.aten

_REPORT = "Install a transformers version of the tested range; if that fails too, report it with the config.json."
HEAD = "lm_head"
"""The name of the last region."""


@gc_paused()
def outline(
    family: Family,
    geometry: Geometry,
    ties: dict[str, str],
    traces: Mapping[str, Trace],
) -> Program:
    """Build the program of all variants, from the trace of each.

    Raises:
        CaptureError: A block uses a parameter of another module, or a size that none of its inputs has.
    """
    program = Program(family.name, geometry, {}, {}, ties)
    for name, trace in traces.items():
        _Outliner(program, family, trace).add_variant(name)
    return program


class _Outliner:
    """Adds one variant to a program, sharing regions that are already there."""

    def __init__(self, program: Program, family: Family, trace: Trace) -> None:
        self.program = program
        self.family = family
        self.trace = trace
        self.module = trace.exported.graph_module
        self.slot_names: dict[str, tuple[str, str]] = {}
        placeholders = {node.name: node for node in self.module.graph.nodes if node.op == "placeholder"}
        self.slot_nodes: dict[str, Node] = {}
        for spec in trace.exported.graph_signature.input_specs:
            if spec.target is not None:
                kind = "parameter" if spec.kind == InputKind.PARAMETER else "buffer" if spec.persistent else "constant"
                name = program.ties.get(spec.target, spec.target)
                self.slot_names[spec.arg.name] = (name, kind)
                self.slot_nodes[name] = placeholders[spec.arg.name]

    def add_variant(self, name: str) -> None:
        inline_no_grad(self.module)  # a region of its own would be cut off from its neighbours otherwise
        owners = _partition(self.module)
        split = split_module(self.module, None, lambda node: owners[node][0], keep_original_order=True)  # type: ignore[arg-type]
        blocks = {f"submod_{number}": block for number, block in owners.values()}
        last = f"submod_{max(number for number, _ in owners.values())}"
        values: dict[Any, tuple[str, ...]] = {}
        calls: list[Call] = []
        for node in split.graph.nodes:
            if node.op == "placeholder":
                values[node] = (node.name,)
            elif node.op == "call_function":  # getitem of a call with several results
                source, index = node.args
                values[node] = (values[source][index],)
            elif node.op == "call_module":
                body, block = getattr(split, node.target), blocks[node.target]
                inputs = [values.get(argument, ("",))[0] for argument in node.args]
                repeated = next((inner for inner in body.graph.nodes if inner.target is REPEAT), None)
                if repeated is None:
                    part_name = HEAD if node.target == last and not block else None
                    call, values[node] = self._call(body, block, inputs, len(calls), part_name)
                else:
                    call = self._repeat(body, repeated, block, inputs, calls)
                    values[node] = call.outputs
                calls.append(call)
        (returned,) = returned_nodes(split)
        self.program.variants[name] = Variant(self.trace.inputs, tuple(calls), values[returned][0])

    def _call(
        self, body: GraphModule, block: str, inputs: list[str], number: int, name: str | None
    ) -> tuple[Call, tuple[str, ...]]:
        """Return the call of a part, and the names of all its former results ("" for sizes, which regions do not pass)."""
        tensors = _drop_size_results(body)
        region, kept = self._region(body, block, name)
        many = sum(tensors)
        outputs = tuple(f"v{number}.{index}" if many > 1 else f"v{number}" for index in range(many))
        remaining = iter(outputs)
        names = tuple(next(remaining) if tensor else "" for tensor in tensors)
        return Call(region, block, tuple(inputs[index] for index in kept), outputs), names

    def _repeat(self, body: GraphModule, node: Node, block: str, inputs: list[str], calls: list[Call]) -> Call:
        """Return the call of a part that repeats another: the same region, with this block's inputs."""
        names = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), inputs, strict=True))
        arguments: Any = node.args
        ours, theirs = ([names[value] for value in group] for group in arguments[:2])
        passed = dict(zip(theirs, ours, strict=True))
        first = next((call for call in calls if call.outputs == (names[arguments[2]],)), None)
        if first is None or not set(first.inputs) <= set(passed):
            raise CaptureError(f"Block {block} reads or returns more than its arguments and its result. {_REPORT}")
        region = self.program.regions[first.region]
        if region.slots != tuple(self._slot(self.slot_nodes[join(block, slot.name)], block) for slot in region.slots):
            raise CaptureError(
                f"Block {block} has other parameters than {first.instance}, whose trace it repeats. {_REPORT}"
            )
        if block not in region.instances:
            region.instances += (block,)
        return Call(region.name, block, tuple(passed[name] for name in first.inputs), (f"v{len(calls)}",))

    def _region(self, body: GraphModule, block: str, name: str | None) -> tuple[str, list[int]]:
        """Return the region of a part, an equal one or a new one, and the indices of the arguments that are activations."""
        _localise_sizes(body, block)
        body.graph.eliminate_dead_code()
        placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
        slots = tuple(self._slot(node, block) for node in placeholders if node.name in self.slot_names)
        kept = [index for index, node in enumerate(placeholders) if node.name not in self.slot_names and node.users]
        _order_placeholders(
            body, [n for n in placeholders if n.name in self.slot_names], [placeholders[i] for i in kept]
        )
        activations = tuple(self._shape(placeholders[index]) for index in kept)
        region = Region(
            name or self._name(block, slots), body, slots, (block,), activations, dimensions=self.trace.dimensions
        )
        text = region_text(region)
        for other in self.program.regions.values():
            same_list = other.instances[0].rpartition(".")[0] == block.rpartition(".")[0]
            if same_list and region_text(other) == text:
                if block not in other.instances:
                    other.instances += (block,)
                return other.name, kept
        region.name = _unused(region, self.program.regions)
        self.program.regions[region.name] = region
        return region.name, kept

    def _shape(self, node: Node) -> Shape:
        sizes = node.meta["val"].shape
        return tuple(size if isinstance(size, int) else Dim.of(size, self.trace.dimensions) for size in sizes)

    def _slot(self, node: Node, block: str) -> Slot:
        name, kind = self.slot_names[node.name]
        value = node.meta["val"]
        if block and not name.startswith(f"{block}."):
            raise CaptureError(
                f"Block {block} uses the parameter {name} of another module, which vlmbuild does not support. {_REPORT}"
            )
        relative = name.removeprefix(f"{block}.") if block else name
        dtype = COMPUTE_DTYPE if kind == "parameter" else value.dtype
        return Slot(relative, tuple(value.shape), dtype, kind, self.family.role(name))  # type: ignore[arg-type]

    def _name(self, block: str, slots: tuple[Slot, ...]) -> str:
        """Name a region: the list's path for blocks; between blocks, the module of the first parameter."""
        path = block.rpartition(".")[0] if block else slots[0].name.rpartition(".")[0] if slots else "glue"
        return path.removeprefix("model.")


def _partition(module: GraphModule) -> dict[Node, tuple[int, str]]:
    """Map every computing node to (partition number, block path or "").

    Numbers never fall along the node order, which is topological, so the parts form a straight line.
    """
    owners: dict[Node, tuple[int, str]] = {}
    number, current = 0, ""
    (head,) = returned_nodes(module)
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        block = _block_of(node)
        if block != current or (node is head and not block):
            number, current = number + 1, block
        owners[node] = (number, block)
    return owners


def _block_of(node: Node) -> str:
    """Return the path of the outermost repeated block that made the node.

    A `ModuleList` is never called, so it is the missing parent in the stack of calls; a numbered child of a called parent
    belongs to an `nn.Sequential` and is no block.
    """
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        if leaf.isdigit() and parent not in paths:
            return str(path)
    return ""


def _drop_size_results(body: GraphModule) -> list[bool]:
    """Make the part return a tuple of its tensors only; returns which of its former results they are. Readers of a size
    take it from their own tensors (`_localise_sizes`)."""
    output = body.graph.output_node()
    results = returned_nodes(body)
    tensors = [isinstance(node.meta["val"], torch.Tensor) for node in results]
    output.args = (tuple(node for node, tensor in zip(results, tensors, strict=True) if tensor),)
    return tensors


def _localise_sizes(body: GraphModule, block: str) -> None:
    """Make sizes come from the part's own activations, first one first: equal blocks then have equal graphs, wherever the
    traced graph happened to read a size, and no integer crosses a region's border. A size that no activation has, such as the
    number of tiles of which there are patches alone, is read where the part computes it."""
    tensors = [n for n in body.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)]
    known: dict[str, Node] = {}
    for node in list(body.graph.nodes):
        size = node.meta.get("val")
        if not isinstance(size, torch.SymInt) or not (node.op == "placeholder" or node.target is aten.sym_size.int):
            continue
        key = str(size)
        if key not in known:
            known[key] = _size_node(body, tensors, key) or _computed_size(node, tensors, key, block)
            known[key].meta["val"] = size
        if node is known[key]:
            continue
        node.replace_all_uses_with(known[key])
        if node.op != "placeholder":
            body.graph.erase_node(node)


def _computed_size(node: Node, tensors: list[Node], key: str, block: str) -> Node:
    if node.op != "placeholder":
        return node
    shapes = ", ".join(f"{tensor.name} {tuple(map(str, tensor.meta['val'].shape))}" for tensor in tensors)
    raise CaptureError(
        f"{block or 'The part between blocks'} needs the size {key}, and its inputs are {shapes}. {_REPORT}"
    )


def _size_node(body: GraphModule, tensors: list[Node], key: str) -> Node | None:
    for tensor in tensors:
        for axis, size in enumerate(tensor.meta["val"].shape):
            if str(size) == key:
                with body.graph.inserting_after(next(n for n in reversed(body.graph.nodes) if n.op == "placeholder")):
                    return body.graph.call_function(aten.sym_size.int, (tensor, axis))
    return None


def _order_placeholders(body: GraphModule, slots: list[Node], activations: list[Node]) -> None:
    """Order placeholders: slots, then used activations, each in their order of first use."""
    anchor = next(iter(body.graph.nodes))
    for node in reversed([*slots, *activations]):
        if node is not anchor:
            anchor.prepend(node)
            anchor = node
    wanted = {*slots, *activations}
    for node in [n for n in body.graph.nodes if n.op == "placeholder" and n not in wanted]:
        body.graph.erase_node(node)
    body.recompile()


def _unused(region: Region, taken: Mapping[str, Region]) -> str:
    """Return a name that no region has yet: with the first child that the namesake lacks ("layers.cross_attn"), or a
    number."""
    if region.name not in taken:
        return region.name
    known = {slot.name.partition(".")[0] for slot in taken[region.name].slots}
    own = (slot.name.partition(".")[0] for slot in region.slots if "." in slot.name)
    child = next((name for name in own if name not in known), None) if region.instances[0] else None
    if child and f"{region.name}.{child}" not in taken:
        return f"{region.name}.{child}"
    return next(name for number in count(2) if (name := f"{region.name}_{number}") not in taken)

"""An ONNX graph while it is built: nodes, shared constants, and weights that lie in a file of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper

OPSET = 23
"""The first with Attention, RotaryEmbedding and RMSNormalization."""
OLDEST_RUNTIME = "1.23.2"
"""The oldest ONNX Runtime that opened and ran the models when it was tried."""
IR_VERSION = 11
CONTRIB = "com.microsoft"
"""ONNX Runtime's own operators."""

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze")
"""Operators that change no more than the shape, so that one after another is one."""

ELEMENT_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}

OnnxShape = Sequence[int | str]


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight in a data file.

    Attributes:
        dtype: Dtype of its elements.
        shape: Static.
        location: Name of the file, beside the graph's.
        offset, length: Position and size in bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int

    def proto(self, name: str) -> TensorProto:
        """Return the initializer that refers to the stored bytes."""
        tensor = TensorProto(name=name, data_type=ELEMENT_TYPES[self.dtype], dims=self.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", self.offset), ("length", self.length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class GraphBuilder:
    """Values are names. A builder inside of another one makes the body of a Loop, which may read the outer values.

    Attributes:
        compute: Takes the place of the compute dtype.
        scope: Leading part of the names of values, for people: the block that is being built.
    """

    def __init__(self, compute: torch.dtype, outer: GraphBuilder | None = None) -> None:
        self.compute = compute
        self.scope: str = outer.scope if outer else ""
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._outer = outer
        self._nodes: list[onnx.NodeProto] = []
        self._views: dict[str, str] = {}
        self._dimensions: dict[tuple[str, int], str] = {}
        self._outputs: dict[str, str] = {}
        self._initializers: dict[str, TensorProto] = {}
        self._shared: dict[Any, Any] = {}
        self._names: dict[str, int] = outer._names if outer else {}

    def op(
        self, operator: str, *inputs: str | None, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> Any:  # a name, or a tuple of them
        """Append a node. None is an input that is left out."""
        names = [self.scoped(operator) for _ in range(outputs)]
        given = [name or "" for name in inputs]
        while given and not given[-1]:
            given.pop()
        self._nodes.append(helper.make_node(operator, given, names, name=names[0], domain=domain, **attributes))
        if operator in _VIEWS:
            self._views[names[0]] = self._views.get(given[0], given[0])
        return names[0] if outputs == 1 else tuple(names)

    def annotate(self, value: str, entries: Mapping[str, Any]) -> None:
        """Add metadata to the node that makes a value."""
        node = next(node for node in reversed(self._nodes) if value in node.output)
        for key, entry in entries.items():
            node.metadata_props.add(key=key, value=str(entry))

    def constant(self, values: Any, dtype: torch.dtype = torch.int64) -> str:
        """Add a small constant to the graph, once; a number is a scalar."""
        tensor = torch.as_tensor(values, dtype=dtype)
        key = (dtype, tuple(tensor.shape), tuple(tensor.flatten().tolist()))

        def make() -> str:
            name = self.scoped("const")
            self._root()._initializers[name] = onnx.numpy_helper.from_array(tensor.numpy(), name)
            return name

        return str(self._root().once(key, make))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the value shared under `key`, made on the first call."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def weight(self, name: str, stored: Stored) -> str:
        """Declare a weight that lies in a data file."""
        self._root()._initializers[name] = stored.proto(name)
        return name

    def cast(self, value: str, dtype: torch.dtype) -> str:
        """Cast a value to another dtype."""
        return str(self.op("Cast", value, to=ELEMENT_TYPES[dtype]))

    def size(self, value: str, axis: int) -> str:
        """Return one size of a value, int64 [1]; inputs share sizes of one name."""
        key = ("size", self._dimensions.get((value, axis), (value, axis)))
        return str(self.once(key, lambda: self.op("Shape", value, start=axis, end=axis + 1)))

    def reshape(self, value: str, sizes: Sequence[int | str]) -> str:
        """Reshape; a size is a number, or the name of an int64 [1]; 0 is the one at that place of the value."""
        fixed = [size for size in sizes if isinstance(size, int)]
        if len(fixed) == len(sizes):
            shape = self.constant(fixed)
        else:
            parts = [self.constant([size]) if isinstance(size, int) else size for size in sizes]
            shape = self.once(("sizes", *parts), lambda: self.op("Concat", *parts, axis=0))
        source = value if 0 in sizes else self._views.get(value, value)
        return str(self.op("Reshape", source, shape))

    def take_input(self, name: str, dtype: torch.dtype, shape: OnnxShape) -> str:
        """Declare an input."""
        self.inputs.append(helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], list(shape)))
        self._dimensions |= {(name, axis): size for axis, size in enumerate(shape) if isinstance(size, str)}
        return name

    def default_input(self, name: str, dtype: torch.dtype, shape: OnnxShape) -> str:
        """Declare an input that may be left out: it is empty then."""
        self.take_input(name, dtype, shape)
        sizes = [size if isinstance(size, int) else 0 for size in shape]
        self._initializers[name] = helper.make_tensor(name, ELEMENT_TYPES[dtype], sizes, [])
        return name

    def give_output(self, name: str, value: str, dtype: torch.dtype, shape: OnnxShape) -> None:
        """Return a value, which has this name from now on; an input's copy."""
        if value in self._outputs or not any(value in node.output for node in self._nodes):
            value = str(self.op("Identity", value))
        self._outputs[value] = name
        self.outputs.append(helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], list(shape)))

    def loop(self, count: str, part: Callable[[GraphBuilder, str], str], axis: int) -> str:
        """Concatenate the results of `part(body, number)` for every number (int64 [1]) below `count` (a scalar)."""
        body = GraphBuilder(self.compute, outer=self)
        element = ELEMENT_TYPES[self.compute]
        number, go_on, parts = (self.scoped(name) for name in ("number", "go_on", "parts"))
        body.take_input(number, torch.int64, [])
        body.take_input(go_on, torch.bool, [])
        body.inputs.append(helper.make_tensor_sequence_value_info(parts, element, None))
        result = part(body, body.op("Unsqueeze", number, body.constant([0])))
        going_on, longer = body.op("Identity", go_on), body.op("SequenceInsert", parts, result)
        body.outputs.append(helper.make_tensor_value_info(going_on, TensorProto.BOOL, []))
        body.outputs.append(helper.make_tensor_sequence_value_info(longer, element, None))
        empty = self.op("SequenceEmpty", dtype=element)
        collected = self.op("Loop", count, self.constant(True, torch.bool), empty, body=body.graph("body"))
        return str(self.op("ConcatFromSequence", collected, axis=axis))

    def scoped(self, kind: str) -> str:
        """Return a new name in the scope."""
        stem = f"{self.scope}/{kind}" if self.scope else kind
        number = self._names[stem] = self._names.get(stem, 0) + 1
        return stem if number == 1 else f"{stem}_{number}"

    def graph(self, name: str) -> onnx.GraphProto:
        """Return the graph, without nodes that no output needs."""
        for node in self._nodes:
            rename(node, self._outputs)
        read = {output.name for output in self.outputs}
        nodes = []
        for node in reversed(self._nodes):
            if not read.isdisjoint(node.output):
                nodes.append(node)
                read |= values_read(node)
        read |= {entry.name for entry in self.inputs}
        kept = [tensor for value, tensor in self._initializers.items() if value in read]
        return helper.make_graph(nodes[::-1], name, self.inputs, self.outputs, kept)

    def model(self, name: str) -> onnx.ModelProto:
        """Return the graph as a model."""
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(
            self.graph(name), opset_imports=opsets, ir_version=IR_VERSION, producer_name="vlmbuild"
        )

    def _root(self) -> GraphBuilder:
        return self if self._outer is None else self._outer._root()


def values_read(node: onnx.NodeProto) -> set[str]:
    """Return names of the values that a node reads, also in the bodies that it runs."""
    inner = [values_read(other) for body in _bodies(node) for other in body.node]
    outputs = {output.name for body in _bodies(node) for output in body.output}
    return {*node.input}.union(outputs, *inner)


def rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    """Give values other names, also in the bodies that a node runs."""
    for values in (node.input, node.output):
        values[:] = [names.get(value, value) for value in values]
    for body in _bodies(node):
        for other in body.node:
            rename(other, names)


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]

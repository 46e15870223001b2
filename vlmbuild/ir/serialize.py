"""Programs as plain JSON values and back: operators from an allow-list, integers, booleans and strings; nothing is evaluated.

Floats are written as `float.hex()` strings, since canonical JSON holds no floats.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

import vlmbuild.ops
from vlmbuild.errors import IncompatibleError
from vlmbuild.formats import format_from_json
from vlmbuild.ir.check import check_counts, check_program
from vlmbuild.ir.dims import parse_shape, shape_json
from vlmbuild.ir.printer import dataflow_order, target_name
from vlmbuild.ir.program import (
    COMPUTE_DTYPE,
    Call,
    Geometry,
    Input,
    Program,
    Region,
    Rotary,
    Slot,
    Variant,
    WeightRecipe,
)
from vlmbuild.ir.schema import PROGRAM_FILE, SCHEMA, Role, SlotKind

__all__ = ["OPERATORS", "PROGRAM_FILE", "SCHEMA", "from_json", "to_json"]

_ATEN = (
    "add.Tensor",
    "cat.default",
    "clamp.default",
    "conv3d.default",
    "cos.default",
    "div.Tensor",
    "embedding.default",
    "expand.default",
    "flatten.using_ints",
    "floor.default",
    "ge.Scalar",
    "gelu.default",
    "index.Tensor",
    "layer_norm.default",
    "linear.default",
    "log.default",
    "matmul.default",
    "mean.dim",
    "movedim.int",
    "mul.Tensor",
    "neg.default",
    "new_zeros.default",
    "permute.default",
    "pow.Tensor_Scalar",
    "reshape.default",
    "rms_norm.default",
    "rsqrt.default",
    "rsub.Scalar",
    "select.int",
    "sigmoid.default",
    "silu.default",
    "sin.default",
    "slice.Tensor",
    "split_with_sizes.default",
    "squeeze.dim",
    "stack.default",
    "sub.Tensor",
    "sum.dim_IntList",
    "sym_size.int",
    "tanh.default",
    "to.dtype",
    "transpose.int",
    "unbind.int",
    "unflatten.int",
    "unsqueeze.default",
    "view.default",
    "where.self",
)
OPERATORS: dict[str, Any] = {
    "getitem": operator.getitem,
    **{f"aten.{name}": getattr(getattr(torch.ops.aten, name.split(".")[0]), name.split(".")[1]) for name in _ATEN},
    **{f"vlmbuild.{row.name}.default": row.overload for row in vlmbuild.ops.OPERATORS.values() if row.in_programs},
}
"""The operators that a stored graph may call."""

_DTYPES = {
    "compute": COMPUTE_DTYPE,
    "float32": torch.float32,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "bool": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def to_json(program: Program) -> dict[str, Any]:
    """Convert a program to plain values.

    Raises:
        IncompatibleError: A graph calls an operator, or holds a value, that no stored program may.
    """
    return {
        "schema": SCHEMA,
        "family": program.family,
        "rotary": [
            {
                "head_dim": rotary.head_dim,
                "sections": list(rotary.sections),
                "shared": rotary.shared,
                "scaling": rotary.scaling.hex(),
                **({"interleaved": True} if rotary.interleaved else {}),
            }
            for rotary in program.geometry.rotary
        ],
        "ties": program.ties,
        "variants": {name: _variant_json(variant) for name, variant in program.variants.items()},
        "regions": [_region_json(region) for region in program.regions.values()],
    }


def from_json(values: Mapping[str, Any]) -> Program:
    """Read a program from plain values; its graphs have code but no shapes.

    Raises:
        IncompatibleError: The schema, an operator or a value is unknown, or something is malformed.
    """
    if not isinstance(values, Mapping) or values.get("schema") != SCHEMA:
        schema = values.get("schema") if isinstance(values, Mapping) else type(values).__name__
        raise IncompatibleError(
            f"The program has schema {schema!r}, and this vlmbuild reads {SCHEMA!r}. Build the artifact again, or use the "
            "version that built it."
        )
    try:
        check_counts(values)
        rotary = tuple(
            Rotary(
                r["head_dim"],
                tuple(r["sections"]),
                r["shared"],
                float.fromhex(r["scaling"]),
                r.get("interleaved", False),
            )
            for r in values["rotary"]
        )
        regions = {entry["name"]: _region(entry) for entry in values["regions"]}
        variants = {name: _variant(entry) for name, entry in values["variants"].items()}
        program = Program(values["family"], Geometry(rotary), variants, regions, dict(values["ties"]))
        check_program(program)
        return program
    except IncompatibleError:
        raise
    except Exception as error:  # fx compiles graphs: even SyntaxError, where warnings are errors
        raise IncompatibleError(
            f"The stored program is malformed: {type(error).__name__} {error}. Build the artifact again."
        ) from error


def _variant_json(variant: Variant) -> dict[str, Any]:
    return {
        "inputs": [
            {"name": entry.name, "dtype": _DTYPE_NAMES[entry.dtype], "shape": shape_json(entry.shape)}
            for entry in variant.inputs
        ],
        "calls": [
            {
                "region": call.region,
                "instance": call.instance,
                "inputs": list(call.inputs),
                "outputs": list(call.outputs),
            }
            for call in variant.calls
        ],
        "output": variant.output,
        **({"presents": list(variant.presents)} if variant.presents else {}),
    }


def _variant(values: Mapping[str, Any]) -> Variant:
    inputs = tuple(Input(e["name"], _DTYPES[e["dtype"]], e["shape"]) for e in values["inputs"])
    calls = tuple(Call(c["region"], c["instance"], tuple(c["inputs"]), tuple(c["outputs"])) for c in values["calls"])
    return Variant(inputs, calls, values["output"], tuple(values.get("presents", ())))


def _region_json(region: Region) -> dict[str, Any]:
    names = {node: index for index, node in enumerate([*region.placeholders(), *dataflow_order(region)])}
    return {
        "name": region.name,
        "instances": list(region.instances),
        "slots": [
            {
                "name": slot.name,
                "shape": list(slot.shape),
                "dtype": _DTYPE_NAMES[slot.dtype],
                "kind": slot.kind,
                "role": slot.role,
            }
            for slot in region.slots
        ],
        "recipes": [
            {
                "source": recipe.source,
                "shape": list(recipe.shape),
                "format": recipe.format.to_json(),
            }
            for recipe in region.recipes
        ],
        "activations": [shape_json(shape) for shape in region.activations],
        "nodes": [_node_json(node, names) for node in dataflow_order(region)],
        "results": _encode(region.results(), names),
    }


def _node_json(node: Node, names: dict[Node, int]) -> dict[str, Any]:
    name = target_name(node)
    if name not in OPERATORS:
        raise IncompatibleError(
            f"The operator {name} may not be stored, since loading an artifact does not allow it. Report it with the "
            "config.json of the model."
        )
    arguments = {"op": name, "args": _encode(node.args, names)}
    return arguments | ({"kwargs": {k: _encode(v, names) for k, v in node.kwargs.items()}} if node.kwargs else {})


def _encode(value: Any, names: dict[Node, int]) -> Any:
    if isinstance(value, Node):
        return {"node": names[value]}
    if isinstance(value, list | tuple):
        return [_encode(item, names) for item in value]
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, torch.dtype) and value in _DTYPE_NAMES:
        return {"dtype": _DTYPE_NAMES[value]}
    if value is None or isinstance(value, bool | int | str):
        return value
    raise IncompatibleError(f"The value {value!r} in a graph cannot be stored. Report it with the model's config.json.")


def _region(values: Mapping[str, Any]) -> Region:
    slots = tuple(_slot(entry) for entry in values["slots"])
    graph = Graph()
    nodes = [graph.placeholder(f"slot_{index}") for index in range(len(slots))]
    nodes += [graph.placeholder(f"in_{index}") for index in range(len(values["activations"]))]
    for entry in values["nodes"]:
        if entry["op"] not in OPERATORS:
            raise IncompatibleError(
                f"The stored program calls {entry['op']!r}, which this vlmbuild does not allow. Rebuild the artifact."
            )
        arguments = tuple(_decode(value, nodes) for value in entry["args"])
        keywords = {key: _decode(value, nodes) for key, value in entry.get("kwargs", {}).items()}
        _check_keywords(entry["op"], keywords)
        nodes.append(graph.call_function(OPERATORS[entry["op"]], arguments, keywords))
    graph.output(tuple(_decode(value, nodes) for value in values["results"]))
    recipes = tuple(
        WeightRecipe(r["source"], tuple(r["shape"]), format_from_json(r["format"])) for r in values["recipes"]
    )
    activations = tuple(parse_shape(shape) for shape in values["activations"])
    module = GraphModule(nn.Module(), graph, class_name="Region")
    return Region(values["name"], module, slots, tuple(values["instances"]), activations, recipes)


def _check_keywords(name: str, keywords: Mapping[str, Any]) -> None:
    """Refuse keywords that the operator does not have: fx writes them into the code that it generates for a graph."""
    schema = getattr(OPERATORS[name], "_schema", None)
    allowed = {argument.name for argument in schema.arguments} if schema else set()
    if unknown := sorted(set(keywords) - allowed):
        raise IncompatibleError(
            f"The stored program calls {name} with the unknown argument {unknown[0]!r}. Build the artifact again."
        )


def _slot(values: Mapping[str, Any]) -> Slot:
    if values["kind"] not in get_args(SlotKind) or values["role"] not in get_args(Role):
        raise IncompatibleError(
            f"The stored program has a slot of kind {values['kind']!r} and role {values['role']!r}, which this vlmbuild does "
            "not know. Build the artifact again."
        )
    return Slot(values["name"], tuple(values["shape"]), _DTYPES[values["dtype"]], values["kind"], values["role"])


def _decode(value: Any, nodes: list[Node]) -> Any:
    if isinstance(value, dict):
        ((kind, inner),) = value.items()
        decoders: dict[str, Callable[[Any], Any]] = {
            "node": nodes.__getitem__,
            "float": float.fromhex,
            "dtype": _DTYPES.__getitem__,
        }
        return decoders[kind](inner)
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    return value

"""Remove from a graph what computes nothing: what tracing leaves behind, in models and in patterns alike."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten
_LARGEST_INT = 2**63 - 1


def simplify(graph_module: GraphModule) -> int:
    """Run `inline_no_grad` and `drop_no_ops`; return how many nodes were changed or removed."""
    return inline_no_grad(graph_module) + drop_no_ops(graph_module)


def inline_no_grad(graph_module: GraphModule) -> int:
    """Inline the bodies of `torch.no_grad` blocks; returns how many. Nothing trainable flows into the blocks that models
    have (tables of positions), so no gradient could flow out of them."""
    wrapped = torch.ops.higher_order.wrap_with_set_grad_enabled
    nodes = [node for node in graph_module.graph.nodes if node.target is wrapped]
    for node in nodes:
        _inline(graph_module, node)
    return len(nodes)


def drop_no_ops(graph_module: GraphModule) -> int:
    """Remove what computes nothing, exactly: assertions on metadata, casts to the dtype that a tensor has, slices of
    everything, products with one, dropout outside training, unused nodes. Casts through `to.device` and `type_as` become
    `to.dtype`: graphs name no device."""
    graph = graph_module.graph
    before = len(graph.nodes)
    changed = 0
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is aten.to.device:
            source, _device, dtype = node.args[:3]
            node.target, node.args = aten.to.dtype, (source, dtype)
            changed += 1
        elif node.target is aten.type_as.default:
            source, like = node.args
            node.target, node.args = aten.to.dtype, (source, like.meta["val"].dtype)
            changed += 1
        if (same := _identity_of(node)) is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return changed + before - len(graph.nodes)


def _identity_of(node: Node) -> Node | None:
    """Return the node that this one merely repeats, else None."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    value = source.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    rest = tuple(node.args[1:])
    if node.target is aten.to.dtype and rest == (value.dtype,):
        return source
    if node.target is aten.dropout.default and rest[1] is False:  # of a model in eval mode
        return source
    if node.target is aten.slice.Tensor and rest[1:] == (0, _LARGEST_INT):
        return source
    if node.target is aten.mul.Tensor and rest == (1.0,) and value.is_floating_point():
        return source
    if node.target is aten.expand.default and _keeps_shape(rest[0], value.shape):
        return source
    return None


def _keeps_shape(sizes: Any, shape: torch.Size) -> bool:
    return len(sizes) == len(shape) and all(size in (-1, have) for size, have in zip(sizes, shape, strict=True))


def _inline(graph_module: GraphModule, node: Node) -> None:
    _enabled, body_node, *inputs = node.args
    assert isinstance(body_node, Node)
    assert isinstance(body_node.target, str)
    body = getattr(graph_module, body_node.target)
    values: dict[Node, Any] = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    with graph_module.graph.inserting_before(node):
        outputs = graph_module.graph.graph_copy(body.graph, values)
    results: Any = outputs
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph_module.graph.erase_node(user)
    graph_module.graph.erase_node(node)
    if not body_node.users:
        graph_module.graph.erase_node(body_node)
        delattr(graph_module, body_node.target)

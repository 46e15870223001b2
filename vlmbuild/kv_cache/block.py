"""One block's graph with a key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from vlmbuild.errors import PassError
from vlmbuild.ir.program import Region
from vlmbuild.ops import ATTENTION

CacheForm = Literal["dynamic", "static"]
""""dynamic" concatenates keys and values with those of new tokens; "static" writes these into buffers."""
FORMS: tuple[CacheForm, ...] = get_args(CacheForm)

aten = torch.ops.aten
_KEY, _VALUE, _BOUNDS, _CAUSAL, _SCALE, _LOOKAHEAD = 1, 2, 4, 7, 8, 9
"""Positions of the operator's arguments. The last may be missing, and so may the window after it."""


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """A block with a cache.

    Attributes:
        region: Its activations are those of the block, with the mask in place of the bounds, and then the cached keys and
            values (and the position, for a static cache). A dynamic cache's keys and values follow the block's results.
        bounds: Index of the mask among the activations.
    """

    region: Region
    bounds: int


def self_attention(region: Region) -> Node | None:
    """Return a block's causal attention within packed samples, None if it has none.

    Raises:
        PassError: It has several.
    """
    nodes = [
        node for node in _attentions(region) if node.args[_CAUSAL] is True and isinstance(node.args[_BOUNDS], Node)
    ]
    if len(nodes) > 1:
        raise PassError(f"{region.name} has {len(nodes)} causal attention operators; a cache needs a block for each.")
    return nodes[0] if nodes else None


def external_keys(region: Region) -> dict[int, str]:
    """Return the indices of activations that attention reads directly, with "key" or "value"."""
    activations = region.placeholders()[len(region.slots) :]
    return {
        activations.index(argument): name
        for node in _attentions(region)
        for name, argument in (("key", node.args[_KEY]), ("value", node.args[_VALUE]))
        if isinstance(argument, Node) and argument in activations
    }


def cached_block(region: Region, form: CacheForm) -> CachedBlock | None:
    """Copy a block and give it a cache; None if the region has no self-attention over samples.

    Before: attention(q, k, v, None, bounds, None, None, True, scale, lookahead, window) [1, heads, batch * new, head dim]
    After, dynamic:
            attention(q', cat(past_key, k'), cat(past_value, v'), mask, None, None, None, True, scale, lookahead', window)
    After, static:
            attention(q', index_copy_(past_key, 2, position, type_as(k', past_key)), ..., mask', None, None, None, False,
            scale)

    q', k', v' and lookahead' are the padded rows [batch, heads, new, head dim]; mask' hides keys before the window. Legal
    because the i-th query from the end sees all keys but the last i, and no padding, as within its bounds; for one new
    token, the last one, the mask alone decides.
    """
    site = self_attention(region)
    if site is None:
        return None
    graph = Graph()
    values: dict[Node, Node] = {}
    outputs: Any = graph.graph_copy(region.graph.graph, values)
    node = values[site]
    bounds = node.args[_BOUNDS]
    assert isinstance(bounds, Node)
    index = _activations(graph, region).index(bounds)
    mask = _placeholder(graph, "attention_mask", bounds)
    past = [_placeholder(graph, name, _activations(graph, region)[-1]) for name in ("past_key", "past_value")]
    with graph.inserting_before(node):
        keys = _read_cache(graph, node, mask, past, form)
    _one_row(graph, node)
    if bounds.users:
        raise PassError(f"{region.name} reads the bounds of samples besides attention; such a block has no cache.")
    graph.erase_node(bounds)
    graph.output((*outputs, *(keys if form == "dynamic" else ())))
    module = GraphModule(nn.Module(), graph, class_name="Region")
    shapes = ((),) * (len(_activations(graph, region)))
    return CachedBlock(
        Region(f"{region.name}.cached", module, region.slots, region.instances, shapes, region.recipes), index
    )


def _read_cache(graph: Graph, node: Node, mask: Node, past: list[Node], form: CacheForm) -> list[Node]:
    """Let attention read cached keys and values, and return these with those of new tokens."""
    query, key, value, *_ = node.args
    lookahead, window = [*node.args[_LOOKAHEAD:], None, None][:2]
    batch = graph.call_function(aten.sym_size.int, (past[0], 0))
    rows = [_rows(graph, x, batch) for x in (query, key, value)]
    others: tuple[Any, ...] = ()
    if form == "dynamic":
        keys = [graph.call_function(aten.cat.default, (pair, 2)) for pair in zip(past, rows[1:], strict=True)]
        ahead = None if lookahead is None else _unpacked(graph, lookahead, 1, batch)
        others = (ahead, window) if window is not None else (ahead,) if ahead is not None else ()
    else:
        position = _placeholder(graph, "cache_position", past[1])
        write = aten.index_copy_.default
        # index_copy_ does not convert, and under autocast a key's norm returns float32
        new = [graph.call_function(aten.type_as.default, pair) for pair in zip(rows[1:], past, strict=True)]
        keys = [graph.call_function(write, (p, 2, position, x)) for p, x in zip(past, new, strict=True)]
        mask = mask if window is None else _within(graph, mask, position, window)
    node.args = (rows[0], *keys, mask, None, None, None, form == "dynamic", node.args[_SCALE], *others)
    return keys


def _within(graph: Graph, mask: Node, position: Node, window: Any) -> Node:
    """Hide the keys of a buffer that come before the window of the token at a position."""
    ordinal = graph.call_function(aten.cumsum.default, (graph.call_function(aten.ones_like.default, (mask,)), 1))
    before = graph.call_function(aten.add.Tensor, (position, 1 - window))
    return graph.call_function(aten.mul.Tensor, (mask, graph.call_function(aten.gt.Tensor, (ordinal, before))))


def _attentions(region: Region) -> list[Node]:
    return [node for node in region.graph.graph.nodes if node.target in ATTENTION]


def _activations(graph: Graph, region: Region) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"][len(region.slots) :]


def _placeholder(graph: Graph, name: str, after: Node) -> Node:
    with graph.inserting_after(after):
        return graph.placeholder(name)


def _rows(graph: Graph, x: Any, batch: Node) -> Node:
    """Unpack [1, heads, batch * new, head dim] to [batch, heads, new, head dim]."""
    return graph.call_function(aten.transpose.int, (_unpacked(graph, x, 2, batch), 0, 1))


def _unpacked(graph: Graph, x: Any, axis: int, batch: Node) -> Node:
    """Unpack tokens along an axis to (batch, new), and take away the axis in front."""
    rows = graph.call_function(aten.unflatten.int, (x, axis, [batch, -1]))
    return graph.call_function(aten.squeeze.dim, (rows, 0))


def _one_row(graph: Graph, node: Node) -> None:
    """Pack the operator's result [batch, new, heads, head dim] to [1, batch * new, heads, head dim]."""
    users = list(node.users)
    with graph.inserting_after(node):
        flat = graph.call_function(aten.flatten.using_ints, (node, 0, 1))
    with graph.inserting_after(flat):
        whole = graph.call_function(aten.unsqueeze.default, (flat, 0))
    for user in users:
        user.replace_input_with(node, whole)

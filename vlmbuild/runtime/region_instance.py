"""Regions bound to a dtype, and the modules that call them with their own parameters."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from vlmbuild.program import COMPUTE_DTYPE, Region, Slot, Variant
from vlmbuild.runtime.compiler import Compiler, mark_dynamic
from vlmbuild.runtime.compiler import apply as run_compiled

_DROPOUT = torch.ops.aten.dropout.default


class BoundRegion:
    """A region with a compute dtype: one graph module for all instances, so that it is compiled once. A region with dropout
    has another one for evaluation, without it.

    Args:
        region: From a program.
        dtype: Takes the place of `COMPUTE_DTYPE` in the graph.
        carried: Which activations are results of another instance of the region.
        dynamic: Whether a compiler is to expect other sizes in the next call.
    """

    def __init__(self, region: Region, dtype: torch.dtype, carried: tuple[int, ...], *, dynamic: bool = True) -> None:
        self.region = region
        self.carried = carried
        self.dynamic = dynamic
        self.rebind(dtype)

    def rebind(self, dtype: torch.dtype) -> None:
        """Build the graph module anew, after a pass or for another dtype."""
        self.graph = region_module(self.region, dtype, dropout=True)
        self.random = any(node.target is _DROPOUT for node in self.graph.graph.nodes)
        self.evaluation = region_module(self.region, dtype) if self.random else self.graph
        names = [slot.name for slot in self.region.slots]
        self.tensors_of: Callable[[nn.Module], tuple[Tensor, ...]] = slots_getter(names)

    def __call__(self, owner: nn.Module, compiler: Compiler, activations: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the graph with the owner's tensors, under the compiler if there is one.

        In training, a carried activation that needs no gradient yet (the first layer's, above frozen embeddings) is made
        to need one: all instances then look alike to autograd, to checkpointing, and to the compiler.
        """
        tensors = self.tensors_of(owner)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            activations = tuple(
                value.detach().requires_grad_() if index in self.carried and not value.requires_grad else value
                for index, value in enumerate(activations)
            )
        return self.run(tensors, compiler, activations, owner.training)

    def run(
        self, tensors: tuple[Tensor, ...], compiler: Compiler, activations: tuple[Tensor, ...], training: bool
    ) -> tuple[Tensor, ...]:
        """Run the graph with these tensors in the places of its slots; `training` applies dropout."""
        if compiler is not None and self.dynamic:
            for value, shape in zip(activations, self.region.activations, strict=True):
                mark_dynamic(value, shape)
        graph = self.graph if training else self.evaluation
        return run_compiled(compiler, graph.forward, (*tensors, *activations))


class RegionInstance(nn.Module):
    """One repeated block: the parameters of an instance, under transformers' names, and the graph that all share.

    It is the unit of gradient checkpointing and of sharding.
    """

    def __init__(self, bound: BoundRegion) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, compiler: Compiler, *activations: Tensor, bound: BoundRegion | None = None) -> tuple[Tensor, ...]:
        """Run its graph, or another one of the same parameters."""
        return (bound or self.bound)(self, compiler, activations)

    def extra_repr(self) -> str:
        return f"region={self.bound.region.name}"


def region_module(region: Region, dtype: torch.dtype, *, dropout: bool = False) -> GraphModule:
    """A region's graph in a compute dtype, with or without its dropout."""
    graph = Graph()
    values: dict[Node, Node] = {}
    for node in region.graph.graph.nodes:
        if node.target is _DROPOUT and not dropout:
            values[node] = values[node.args[0]]
            continue
        copied = graph.node_copy(node, values.__getitem__)
        copied.args = _with_dtype(copied.args, dtype)
        copied.kwargs = _with_dtype(copied.kwargs, dtype)
        copied.meta = {}
        values[node] = copied
    return GraphModule(nn.Module(), graph, class_name="Region")


def carried_activations(region: Region, variants: dict[str, Variant]) -> tuple[int, ...]:
    """Places of a region's activations that come from another repeated block, of the same region or of one like it."""
    places = set()
    for variant in variants.values():
        produced = {value for call in variant.calls if call.instance for value in call.outputs}
        for call in variant.calls:
            if call.region == region.name:
                places |= {place for place, value in enumerate(call.inputs) if value in produced}
    return tuple(sorted(places))


def is_compute(slot: Slot) -> bool:
    """Whether a slot's tensor follows the compute dtype."""
    return slot.dtype == COMPUTE_DTYPE


def slots_getter(names: list[str]) -> Callable[[nn.Module], tuple[Tensor, ...]]:
    """Looks up an owner's tensors by the names of slots."""
    if not names:
        return lambda _owner: ()
    get: Callable[[nn.Module], Any] = attrgetter(*names)
    return (lambda owner: (get(owner),)) if len(names) == 1 else get


def _with_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _with_dtype(item, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_with_dtype(item, dtype) for item in value)
    return dtype if value is COMPUTE_DTYPE else value

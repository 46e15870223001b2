"""A region bound to a compute dtype, and the modules that call it with their own parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node

from vlmbuild.ir.program import COMPUTE_DTYPE, Region, Slot, Variant
from vlmbuild.runtime.compiler import Compiler, mark_dynamic
from vlmbuild.runtime.compiler import apply as run_compiled

DROPOUT, EMBEDDING = torch.ops.aten.dropout.default, torch.ops.aten.embedding.default


class RegionRunner(Protocol):
    """Runs a region: its graph, or code that was compiled from it."""

    def __call__(self, owner: nn.Module, compiler: Compiler, activations: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the region's results, with the owner's tensors in its slots."""


class BoundRegion:
    """A region in a compute dtype: one graph for all instances, so that it is compiled once.

    A region with dropout has a second graph for evaluation, without it.

    Args:
        region: Region of a program.
        dtype: Replaces `COMPUTE_DTYPE` in the graph.
        carried: Indices of the activations that are results of another instance of the region.
        fixed: True if compilers expect the same sizes in every call.
    """

    def __init__(
        self, region: Region, dtype: torch.dtype, carried: tuple[int, ...] = (), *, fixed: bool = False
    ) -> None:
        self.region = region
        self.carried = carried
        self.adapter_disabled = False
        self.dropout_disabled = False
        self.fixed = fixed
        self.random = any(node.target is DROPOUT for node in region.graph.graph.nodes)
        tables = {node for node, slot in region.slot_nodes().items() if slot.role == "embedding"}
        self.embeds = any(node.target is EMBEDDING and node.args[0] in tables for node in region.graph.graph.nodes)
        self._slots = slots_getter([slot.name for slot in region.slots])
        self._adapters = [".lora_B." in slot.name for slot in region.slots]
        self.graph = with_dtype(region, dtype)
        self._evaluation = with_dtype(region, dtype, dropout=False) if self.random else self.graph

    def tensors_of(self, owner: nn.Module) -> tuple[Tensor, ...]:
        """Return the tensors of the slots; an adapter that is disabled has a zero matrix B."""
        tensors = self._slots(owner)
        if self.adapter_disabled:
            zeros = zip(tensors, self._adapters, strict=True)
            tensors = tuple(torch.zeros_like(tensor) if of_adapter else tensor for tensor, of_adapter in zeros)
        return tensors

    def __call__(self, owner: nn.Module, compiler: Compiler, activations: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the graph with the owner's tensors, under the compiler if there is one.

        In training, a carried activation without gradient (the first layer's, above frozen embeddings) is given one: all
        instances then look alike to autograd, to checkpointing, and to the compiler.
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
        """Run the graph with these tensors in its slots; `training` applies dropout."""
        forward: Callable[..., tuple[Tensor, ...]] = self._graph_for(training).forward
        if compiler is not None and not self.fixed:
            for value, shape in zip(activations, self.region.activations, strict=True):
                mark_dynamic(value, shape)
        return run_compiled(compiler, forward, (*tensors, *activations))

    def run_with(self, owner: nn.Module, activations: tuple[Tensor, ...], table: Tensor, embed: Embed) -> Any:
        """Run the graph uncompiled, with `embed` in place of looking up rows of the table of embeddings."""
        module = self._graph_for(owner.training)
        return _WithEmbed(module, table, embed).run(*self.tensors_of(owner), *activations)

    def _graph_for(self, training: bool) -> GraphModule:
        return self.graph if training and not self.dropout_disabled else self._evaluation


Embed = Callable[[Tensor, int], Tensor]
"""(ids [1, tokens], padding_idx) -> embeddings [1, tokens, hidden]."""


class _WithEmbed(Interpreter):
    def __init__(self, module: GraphModule, table: Tensor, embed: Embed) -> None:
        super().__init__(module)
        self.table, self.embed = table, embed

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is EMBEDDING and args[0] is self.table:
            return self.embed(args[1], args[2] if len(args) > 2 else -1)
        return super().call_function(target, args, kwargs)


class RegionInstance(nn.Module):
    """One repeated block: the parameters of an instance, under transformers' names, and the graph that all share.

    It is the unit of gradient checkpointing and of sharding.
    """

    region = ""
    """Name of its region."""

    def forward(self, *activations: Tensor, runner: RegionRunner, compiler: Compiler) -> tuple[Tensor, ...]:
        """Run the instance's graph, or another one of the same parameters."""
        return runner(self, compiler, activations)

    def extra_repr(self) -> str:
        return f"region={self.region}"


def with_dtype(region: Region, dtype: torch.dtype, *, dropout: bool = True) -> GraphModule:
    """Copy a region's graph with `dtype` for `COMPUTE_DTYPE`, with or without its dropout."""
    graph = Graph()
    values: dict[Node, Node] = {}
    for node in region.graph.graph.nodes:
        if node.target is DROPOUT and not dropout:
            values[node] = values[node.args[0]]
            continue
        copied = graph.node_copy(node, values.__getitem__)
        copied.args = _replaced(copied.args, dtype)
        copied.kwargs = _replaced(copied.kwargs, dtype)
        copied.meta = {}
        values[node] = copied
    return GraphModule(nn.Module(), graph, class_name="Region")


def _replaced(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_replaced(item, dtype) for item in value)
    return dtype if value is COMPUTE_DTYPE else value


def carried_activations(region: Region, variants: dict[str, Variant]) -> tuple[int, ...]:
    """Return indices of a region's activations that come from another repeated block, of the same region or a similar one."""
    carried = set()
    for variant in variants.values():
        produced = {value for call in variant.calls if call.instance for value in call.outputs}
        for call in variant.calls:
            if call.region == region.name:
                carried |= {index for index, value in enumerate(call.inputs) if value in produced}
    return tuple(sorted(carried))


def is_compute(slot: Slot) -> bool:
    """Return whether a slot's tensor follows the compute dtype."""
    return slot.dtype == COMPUTE_DTYPE


def slots_getter(names: list[str]) -> Callable[[nn.Module], tuple[Tensor, ...]]:
    """Return a function that looks tensors up by name, through the modules' own tables: module attributes are slow."""
    return partial(_tensors, [(tuple(name.split(".")[:-1]), name.rpartition(".")[2]) for name in names])


def _tensors(paths: list[tuple[tuple[str, ...], str]], owner: nn.Module) -> tuple[Tensor, ...]:
    return tuple([_tensor(owner, path, leaf) for path, leaf in paths])


def _tensor(module: Any, path: tuple[str, ...], leaf: str) -> Tensor:
    for part in path:
        module = module._modules[part]
    parameter = module._parameters.get(leaf)
    tensor: Tensor = getattr(module, leaf) if parameter is None else parameter
    return tensor

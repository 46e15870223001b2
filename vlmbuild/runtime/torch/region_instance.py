"""A region bound to a compute dtype, and the modules that call it with their own parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from vlmbuild.ir.program import COMPUTE_DTYPE, Region, Slot, Variant
from vlmbuild.runtime.compiler import Compiler, mark_dynamic
from vlmbuild.runtime.compiler import apply as run_compiled
from vlmbuild.runtime.torch.graphs import aten_module, eager_module, has_dropout, one_token_module


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
        one_token: True if compilers expect one token per row, and the same sizes in every call.
    """

    def __init__(
        self, region: Region, dtype: torch.dtype, carried: tuple[int, ...] = (), *, one_token: bool = False
    ) -> None:
        self.region = region
        self.carried = carried
        self.one_token = one_token
        self.random = has_dropout(region)
        self.tensors_of = slots_getter([slot.name for slot in region.slots])
        self.rebind(dtype)

    def rebind(self, dtype: torch.dtype) -> None:
        """Build the graph modules for another dtype."""
        modules = {True: aten_module(self.region, dtype)}
        modules[False] = aten_module(self.region, dtype, dropout=False) if self.random else modules[True]
        self._eager = {training: eager_module(module) for training, module in modules.items()}
        self._compiled = modules
        if self.one_token:
            self._compiled = {training: one_token_module(module) for training, module in modules.items()}

    @property
    def graph(self) -> GraphModule:
        """The training graph as compilers read it: aten's operators, with overrides for steps of one token."""
        return self._compiled[True]

    @property
    def eager(self) -> GraphModule:
        """The training graph as Python runs it."""
        return self._eager[True]

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
        if compiler is not None:
            if not self.one_token:
                for value, shape in zip(activations, self.region.activations, strict=True):
                    mark_dynamic(value, shape)
            return run_compiled(compiler, self._compiled[training].forward, (*tensors, *activations))
        forward: Callable[..., tuple[Tensor, ...]] = self._eager[training].forward
        if torch.is_grad_enabled():
            return forward(*tensors, *activations)
        with torch._C._AutoDispatchBelowAutograd():  # autograd of an operator in Python is Python too
            return forward(*tensors, *activations)


class RegionInstance(nn.Module):
    """One repeated block: the parameters of an instance, under transformers' names, and the graph that all share.

    It is the unit of gradient checkpointing and of sharding.
    """

    def __init__(self, bound: BoundRegion) -> None:
        super().__init__()
        self.bound = bound

    def forward(
        self, compiler: Compiler, *activations: Tensor, bound: RegionRunner | None = None
    ) -> tuple[Tensor, ...]:
        """Run the instance's graph, or another one of the same parameters."""
        return (bound or self.bound)(self, compiler, activations)

    def extra_repr(self) -> str:
        return f"region={self.bound.region.name}"


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
    paths = [(tuple(name.split(".")[:-1]), name.rpartition(".")[2]) for name in names]
    return lambda owner: tuple([_tensor(owner, path, leaf) for path, leaf in paths])


def _tensor(module: Any, path: tuple[str, ...], leaf: str) -> Tensor:
    for part in path:
        module = module._modules[part]
    parameter = module._parameters.get(leaf)
    tensor: Tensor = getattr(module, leaf) if parameter is None else parameter
    return tensor

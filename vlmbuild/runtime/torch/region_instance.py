"""Regions bound to a dtype, and the modules that call them with their own parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from vlmbuild.ir.program import COMPUTE_DTYPE, Region, Slot, Variant
from vlmbuild.runtime.compiler import Compiler, mark_dynamic
from vlmbuild.runtime.torch.bound_graph import BoundGraph


class RegionRunner(Protocol):
    """Runs a region: its graph, or code that was compiled from it."""

    def __call__(self, owner: nn.Module, compiler: Compiler, activations: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The region's results, with the owner's tensors in the places of its slots."""


class BoundRegion:
    """A region with a compute dtype: one graph module for all instances, so that it is compiled once. A region with dropout
    has another one for evaluation, without it.

    Args:
        region: From a program.
        dtype: Takes the place of `COMPUTE_DTYPE` in the graph.
        carried: Which activations are results of another instance of the region.
        one_token: Whether it is a step of one token a row, with the same sizes again in the next call; else a compiler is to
            expect others.
    """

    def __init__(
        self, region: Region, dtype: torch.dtype, carried: tuple[int, ...], *, one_token: bool = False
    ) -> None:
        self.region = region
        self.carried = carried
        self.one_token = one_token
        self.rebind(dtype)

    def rebind(self, dtype: torch.dtype) -> None:
        """Build the graph module anew, after a pass or for another dtype."""
        self._training = BoundGraph(self.region, dtype, one_token=self.one_token)
        self.random = self._training.random
        self._evaluation = self._training
        if self.random:
            self._evaluation = BoundGraph(self.region, dtype, dropout=False, one_token=self.one_token)
        names = [slot.name for slot in self.region.slots]
        self.tensors_of: Callable[[nn.Module], tuple[Tensor, ...]] = slots_getter(names)

    @property
    def graph(self) -> GraphModule:
        """As compilers get it: of aten's operators, and for steps of one token with spellings that they fuse."""
        return self._training.compiled

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
        if compiler is not None and not self.one_token:
            for value, shape in zip(activations, self.region.activations, strict=True):
                mark_dynamic(value, shape)
        graph = self._training if training else self._evaluation
        return graph.run(compiler, (*tensors, *activations))


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
        """Run its graph, or another one of the same parameters."""
        return (bound or self.bound)(self, compiler, activations)

    def extra_repr(self) -> str:
        return f"region={self.bound.region.name}"


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
    """Looks tensors up by name as they are now. Through the modules' own tables: attributes of modules are slow."""
    places = [(tuple(name.split(".")[:-1]), name.rpartition(".")[2]) for name in names]
    return lambda owner: tuple([_tensor(owner, path, leaf) for path, leaf in places])


def _tensor(module: Any, path: tuple[str, ...], leaf: str) -> Tensor:
    for part in path:
        module = module._modules[part]
    parameter = module._parameters.get(leaf)
    found: Tensor = getattr(module, leaf) if parameter is None else parameter
    return found

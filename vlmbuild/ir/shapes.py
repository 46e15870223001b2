"""Shapes of a program's values, from its variants' inputs alone; a loaded program's graphs have none."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Interpreter, Node

from vlmbuild.errors import IncompatibleError
from vlmbuild.ir.dims import Dim, Shape, evaluate_shape, shape_names
from vlmbuild.ir.interpret import run_calls
from vlmbuild.ir.program import Call, Program, Region

Values = dict[Node, Any]

_PRIMES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31)
"""Example sizes: distinct, so that two symbols are never taken for one, and neither 0 nor 1, which are special cases."""


class Shapes:
    """The values that regions compute, as tensors without data.

    Attributes:
        values: Region name -> the values of its nodes. Instances of a region have the same.
        dimensions: Symbol in shapes -> name of the program's dimension.
    """

    def __init__(self, program: Program, names: Collection[str] | None = None) -> None:
        """
        Args:
            program: Its graphs need no shapes.
            names: Names of the regions to run; None runs all. Variants without any of them are not run.
        """
        needed = set(program.regions if names is None else names)
        dims = sorted(shape_names(entry.shape for variant in program.variants.values() for entry in variant.inputs))
        example = _symbolic(dims)
        self._mode = example.fake_mode
        self._symbols: dict[str, torch.SymInt] = dict(zip(dims, example.shape, strict=True))
        self.dimensions = {str(symbol): name for name, symbol in self._symbols.items()}
        self.values: dict[str, Values] = {}
        for variant in sorted(program.variants.values(), key=lambda variant: len(variant.calls)):
            if self.values.keys() >= needed:
                break
            known = {entry.name: self._empty(entry.shape, entry.dtype) for entry in variant.inputs}
            run_calls(variant.calls, known, partial(self._call, program))

    def annotate(self, region: Region) -> None:
        """Give a region's nodes their values, and its shapes the names of dimensions."""
        for node, value in self.values[region.name].items():
            node.meta["val"] = value
        region.dimensions = self.dimensions
        activations = region.placeholders()[len(region.slots) :]
        region.activations = tuple(self.sizes(node.meta["val"]) for node in activations)

    def sizes(self, value: Tensor) -> Shape:
        """Return the shape of a value in the names of dimensions."""
        return tuple(s if isinstance(s, int) else Dim.of(s, self.dimensions) for s in value.shape)

    def _empty(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        with self._mode:
            return torch.empty(evaluate_shape(shape, self._symbols), dtype=dtype, device="meta")

    def _call(self, program: Program, call: Call, activations: tuple[Tensor, ...]) -> list[Tensor]:
        region = program.regions[call.region]
        if region.name not in self.values:
            self.values[region.name] = self._run(region, activations)
        return [self.values[region.name][node] for node in region.results()]

    def _run(self, region: Region, activations: tuple[Tensor, ...]) -> Values:
        recorder = _Recorder(region.graph, garbage_collect_values=False)
        slots = [self._empty(slot.shape, slot.dtype) for slot in region.slots]
        with self._mode, torch.no_grad(), enable_python_dispatcher():  # as in `rewrite.pass_manager.refresh`
            recorder.run(*slots, *activations)
        return recorder.values


def annotate_shapes(program: Program) -> None:
    """Give every node of a program's regions its value, in place, as in a captured program."""
    shapes = Shapes(program)
    for region in program.regions.values():
        shapes.annotate(region)


class _Recorder(Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.values: Values = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            self.values[n] = result
        return result


def _symbolic(names: list[str]) -> Any:
    """Make a tensor without data that has a symbol for each name as a dimension."""

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clone()

    if len(names) > len(_PRIMES):
        raise IncompatibleError(
            f"The program has {len(names)} dynamic dimensions ({', '.join(names)}), and at most {len(_PRIMES)} can be "
            "followed. Build the artifact again with this version of vlmbuild."
        )
    sizes = _PRIMES[: len(names)]
    dims = {axis: torch.export.Dim(name) for axis, name in enumerate(names)}
    example = torch.empty(sizes, device="meta")
    exported = torch.export.export(Same(), (example,), dynamic_shapes=(dims,), strict=False)
    (value,) = (node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder")
    return value

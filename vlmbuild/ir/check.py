"""Checks of a stored program, whoever wrote it: its parts fit together, and it computes no more than a model of its size does.

Nothing is evaluated: graphs run once on tensors without data (torch's meta device), which shows operators that get what they
cannot take, and values that grow beyond all measure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from vlmbuild.errors import IncompatibleError
from vlmbuild.ir.dims import evaluate_shape, shape_names
from vlmbuild.ir.interpret import run_calls
from vlmbuild.ir.program import Call, Program, Region

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z0-9][A-Za-z0-9_]*)*")
_TAKEN = frozenset(dir(nn.Module))
"""Attributes that every module has; a parameter must not hide one."""

LARGEST = {"variants": 16, "regions": 256, "instances": 10_000, "nodes": 10_000}
"""The most of each that a program may have, instances and nodes of all regions together. The largest known have 2, 9, 200 and
1,000."""
_GROWTH = 64
"""The most elements of all values of a region: this many times the rows of the batch times its widest weight or input."""
_SIZES = {"sequence": 1024, "merged": 1024, "patches": 1024}
_OTHER_SIZE = 4
"""Example sizes of inputs; images, samples and segments are few."""
_LONGEST_LIST = 4096
"""The most tensors that one operator may return."""


def check_counts(values: Mapping[str, Any]) -> None:
    """Raise IncompatibleError for plain values of a program with more parts than any model has."""
    regions = values["regions"]
    counts = {
        "variants": len(values["variants"]),
        "regions": len(regions),
        "instances": sum(len(entry["instances"]) for entry in regions),
        "nodes": sum(len(entry["slots"]) + len(entry["nodes"]) for entry in regions),
    }
    for what, count in counts.items():
        if count > LARGEST[what]:
            raise IncompatibleError(
                f"The stored program has {count} {what}, and at most {LARGEST[what]} are read. Build the artifact again."
            )


def check_program(program: Program) -> None:
    """Refuse what cannot be a model.

    Raises:
        IncompatibleError: A region computes more than a model of its size does, or an operator gets what it cannot take.
        ValueError: A name cannot become a module's attribute, or a call does not fit.
    """
    _check_names(program)
    _check_calls(program)
    for name, variant in program.variants.items():
        sizes = {name: _SIZES.get(name, _OTHER_SIZE) for name in shape_names(entry.shape for entry in variant.inputs)}
        try:
            values = {
                entry.name: torch.empty(evaluate_shape(entry.shape, sizes), dtype=entry.dtype, device="meta")
                for entry in variant.inputs
            }
            rows = max((size for tensor in values.values() for size in tensor.shape), default=1)
            run_calls(variant.calls, values, partial(_run, program, rows, {}))
        except IncompatibleError:
            raise
        except Exception as error:  # operators raise many kinds about arguments that they cannot take
            reason = str(error).partition("\n")[0]
            raise IncompatibleError(
                f"The stored program cannot run: variant {name!r}: {reason}. Build the artifact again."
            ) from error


def _check_names(program: Program) -> None:
    named = [name for name, _ in program.slots()] + list(program.ties)
    named += [name for region in program.regions.values() for name in region.instances if name]
    for name in named:
        if not _NAME.fullmatch(name) or not _TAKEN.isdisjoint(name.split(".")):
            raise ValueError(f"{name!r} cannot be the name of a parameter or module")
    held = {name for name, _ in program.slots()}
    if lost := sorted(set(program.ties.values()) - held):
        raise ValueError(f"{lost[0]!r} is shared but does not exist")


def _check_calls(program: Program) -> None:
    """Refuse calls that do not fit, and a second call of an instance: a variant runs each part of the model once. Parts
    without parameters, which join others, may run as often as those."""
    for variant in program.variants.values():
        known = {entry.name for entry in variant.inputs}
        called: set[tuple[str, str]] = set()
        for call in variant.calls:
            if call.instance not in program.regions[call.region].instances or not known.issuperset(call.inputs):
                raise ValueError(f"a call of {call.region} does not fit the program")
            if (call.region, call.instance) in called and program.regions[call.region].slots:
                raise ValueError(f"{call.instance or call.region!r} is called twice")
            called.add((call.region, call.instance))
            known.update(call.outputs)
        if len(variant.calls) > 2 * len(called):
            raise ValueError(f"{len(variant.calls)} calls of {len(called)} parts are more than any model has")
        if lost := sorted({variant.output, *variant.presents} - known):
            raise ValueError(f"{lost[0]!r} is never computed")


def _run(
    program: Program, rows: int, done: dict[Any, list[Tensor]], call: Call, activations: tuple[Tensor, ...]
) -> list[Tensor]:
    """Run a region on tensors without data; blocks that get the same are run once."""
    region = program.regions[call.region]
    key = (region.name, *((x.shape, x.dtype) for x in activations))
    if key not in done:
        slots = [torch.empty(slot.shape, dtype=slot.dtype, device="meta") for slot in region.slots]
        with torch.no_grad():
            results = _Measured(region, rows).run(*slots, *activations)
        if not all(isinstance(result, Tensor) for result in results):
            raise ValueError(f"{region.name} returns something else than tensors")
        done[key] = list(results)
    return done[key]


class _Measured(Interpreter):
    """Runs a graph and counts the elements of its values."""

    def __init__(self, region: Region, rows: int) -> None:
        super().__init__(region.graph)
        self.extra_traceback = False  # fx would append it to messages
        self._name, self._total = region.name, 0
        shapes = [*(slot.shape for slot in region.slots), *region.activations]
        widest = max((size for shape in shapes for size in shape if isinstance(size, int)), default=1)
        self._limit = _GROWTH * rows * widest

    def run_node(self, n: Node) -> Any:
        if n.target is torch.ops.aten.unbind.int:
            tensor, *dim = self.fetch_args_kwargs_from_env(n)[0]
            if tensor.shape[dim[0] if dim else 0] > _LONGEST_LIST:
                raise IncompatibleError(
                    f"The stored program splits {tuple(tensor.shape)} into more than {_LONGEST_LIST} tensors in {self._name}. "
                    "Build the artifact again."
                )
        result = super().run_node(n)
        if n.op == "call_function":
            tensors = result if isinstance(result, list | tuple) else [result]
            self._total += sum(tensor.numel() for tensor in tensors if isinstance(tensor, Tensor))
            if self._total > self._limit:
                raise IncompatibleError(
                    f"The values of {self._name} in the stored program take more memory than those of a model of its size. "
                    "Build the artifact again."
                )
        return result

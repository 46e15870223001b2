"""Run the calls of a variant in order: the one loop for execution, measurement and shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from vlmbuild.ir.program import Call, Program, Region, Variant

T = TypeVar("T")

TensorsOf = Callable[[Region, str], Sequence[Tensor]]
"""(region, instance) -> the tensors of its slots, in order."""
RunRegion = Callable[[Region, tuple[Tensor, ...], tuple[Tensor, ...]], Sequence[Tensor]]
"""(region, tensors of its slots, activations) -> its results."""


def run(
    program: Program,
    variant: Variant,
    inputs: Mapping[str, Tensor],
    tensors_of: TensorsOf,
    run_region: RunRegion,
    *,
    keep: Collection[str] = (),
    on_call: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Run a variant; only the tensors of one instance are in memory at a time.

    Args:
        program: Holds the regions.
        variant: One of its variants.
        inputs: The variant's inputs by name.
        tensors_of: Makes the tensors of an instance when it is called.
        run_region: Computes a region, with the graph and the dtype that the caller wants.
        keep: Names of values to return besides the output and the presents.
        on_call: Called after each call with the number of calls that have run.

    Returns:
        The output, the presents and the kept values by name.
    """
    values = dict(inputs)
    kept = {variant.output, *variant.presents, *keep}
    done = 0

    def step(call: Call, activations: tuple[Tensor, ...]) -> Sequence[Tensor]:
        nonlocal done
        region = program.regions[call.region]
        results = run_region(region, tuple(tensors_of(region, call.instance)), activations)
        done += 1
        if on_call is not None:
            on_call(done)
        return results

    run_calls(variant.calls, values, step, keep=kept)
    return {name: values[name] for name in kept}


def run_calls(
    calls: Sequence[Call],
    values: dict[str, T],
    run_call: Callable[[Call, tuple[T, ...]], Sequence[T]],
    keep: Collection[str] = (),
) -> None:
    """Run calls in order on named values, in place: results are added, and a value is dropped with its last reader unless it
    is one to keep. Results that nothing reads stay."""
    last = {name: number for number, call in enumerate(calls) for name in call.inputs}
    for number, call in enumerate(calls):
        arguments = tuple(values[name] for name in call.inputs)
        for name in set(call.inputs):
            if last[name] == number and name not in keep:
                del values[name]
        results = run_call(call, arguments)
        del arguments
        values.update(zip(call.outputs, results, strict=True))
        del results

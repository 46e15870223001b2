"""The loop over calls: results by name, values dropped with their last reader, tensors made when a call runs."""

from __future__ import annotations

import pytest
import torch
from tiny import linear_region, region_program

from vlmbuild.ir.interpret import run, run_calls
from vlmbuild.ir.program import COMPUTE_DTYPE, Call, Input, Variant

CALLS = (
    Call("add", "a", ("x", "y"), ("u",)),
    Call("add", "b", ("u", "x"), ("v",)),
    Call("add", "c", ("v", "v"), ("w", "unread")),
)


def test_a_value_is_dropped_with_its_last_reader():
    values, seen = {"x": 1, "y": 2}, []

    def add(call, arguments):
        seen.append(set(values))
        return [sum(arguments)] * len(call.outputs)

    run_calls(CALLS, values, add, keep=("v",))
    assert seen == [{"x"}, set(), {"v"}]  # while a call runs, its caller alone holds its arguments
    assert values == {"v": 4, "w": 8, "unread": 8}


def test_results_must_be_as_many_as_the_call_names():
    with pytest.raises(ValueError, match="zip"):
        run_calls(CALLS[2:], {"v": 1}, lambda call, arguments: [1])


def test_a_program_runs_with_tensors_that_are_made_for_each_call():
    program = region_program(linear_region(features=(128, 128)))
    calls = tuple(Call("blocks", f"blocks.{n}", (f"v{n}",), (f"v{n + 1}",)) for n in range(2))
    variant = Variant((Input("v0", COMPUTE_DTYPE, (1, "tokens", 128)),), calls, "v2")
    weights = {f"blocks.{n}": (torch.randn(128, 128), torch.randn(128)) for n in range(2)}
    x = torch.randn(1, 3, 128)
    made, done = [], []

    def tensors_of(region, instance):
        made.append((region.name, instance))
        return weights[instance]

    def run_region(region, tensors, activations):
        return region.graph(*tensors, *activations)

    results = run(program, variant, {"v0": x}, tensors_of, run_region, keep=("v1",), on_call=done.append)
    hidden = torch.nn.functional.linear(x, *weights["blocks.0"])
    assert torch.equal(results["v1"], hidden) and results.keys() == {"v1", "v2"}
    assert torch.equal(results["v2"], torch.nn.functional.linear(hidden, *weights["blocks.1"]))
    assert made == [("blocks", "blocks.0"), ("blocks", "blocks.1")] and done == [1, 2]

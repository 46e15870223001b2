"""Pattern rewriting: matches, literals, reasons of refusals."""

from __future__ import annotations

import torch
from torch.export import Dim

from vlmbuild.rewrite.pattern import Rewrite, apply, trace

aten = torch.ops.aten
EXAMPLE = (torch.empty(5, 8, device="meta"),)
DYNAMIC = ({0: Dim("rows")},)


def swish(x):
    return x * torch.sigmoid(x * 2.0)


def graph_of(function):
    return torch.fx.GraphModule(torch.nn.Module(), trace(function, EXAMPLE, DYNAMIC))


def rewrite(**changes):
    fields = {"pattern": swish, "replacement": torch.nn.functional.silu, "example": EXAMPLE, "dynamic": DYNAMIC}
    return Rewrite(**(fields | changes))


def targets(module):
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def test_every_site_is_replaced():
    module = graph_of(lambda x: swish(swish(x) + 1.0))
    assert apply(module, rewrite()) == (2, [])
    assert targets(module) == [aten.silu.default, aten.add.Tensor, aten.silu.default]
    assert apply(module, rewrite()) == (0, [])


def test_other_literals_are_no_match():
    module = graph_of(lambda x: x * torch.sigmoid(x * 3.0))
    assert apply(module, rewrite()) == (0, [])


def test_value_used_elsewhere_is_no_match():
    def function(x):
        inner = torch.sigmoid(x * 2.0)
        return x * inner + inner

    assert apply(graph_of(function), rewrite()) == (0, [])


def test_refused_sites_give_their_reason():
    seen = []

    def check(x):
        seen.append(x.op)
        return "comes from outside" if x.op == "placeholder" else None

    module = graph_of(lambda x: swish(swish(x) + 1.0))
    assert apply(module, rewrite(check=check)) == (1, ["comes from outside"])
    assert sorted(seen) == ["call_function", "placeholder"]


def test_equal_examples_are_different_inputs():
    two = (EXAMPLE[0], EXAMPLE[0])
    graph = trace(lambda a, b: a - b, two, (DYNAMIC[0], DYNAMIC[0]))
    (result,) = [node for node in graph.nodes if node.op == "call_function"]
    assert result.args[0] is not result.args[1]

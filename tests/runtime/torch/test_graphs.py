"""Graphs of a region: bit-identical as Python runs them, and equal to rounding in steps of one token."""

from __future__ import annotations

import matrix
import pytest
import torch
from parity import relative
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Interpreter

from vlmbuild.ir.program import Region
from vlmbuild.runtime.torch.graphs import aten_module, one_token_module
from vlmbuild.runtime.torch.region_instance import BoundRegion

LINEAR = torch.ops.aten.linear.default


@pytest.fixture(scope="module", params=matrix.SETUPS)
def setup(request):
    return matrix.tiny(request.param)


@pytest.fixture(scope="module")
def model(setup):
    return matrix.bind(setup, matrix.program(setup), matrix.reference(setup))


@pytest.fixture(scope="module")
def batch(setup):
    return matrix.batch(setup, matrix.conversations(setup)["counts differ, left"][0], "left")


def compare_calls(monkeypatch, other):
    """Run every region another way too, on copies: `other(bound, tensors)` gives its results. Returns the errors so far."""
    run, found = BoundRegion.run, []

    def both(self, tensors, compiler, activations, training):
        copies = [tensor.clone(memory_format=torch.preserve_format) for tensor in (*tensors, *activations)]
        results = run(self, tensors, compiler, activations, training)
        found.extend(zip(results, other(self, copies), strict=True))
        return results

    monkeypatch.setattr(BoundRegion, "run", both)
    return found


def interpret(module, tensors):
    return Interpreter(module).run(*tensors)


def aten(bound, tensors):
    return interpret(aten_module(bound.region, torch.float32), tensors)


def one_token(bound, tensors):
    return interpret(one_token_module(aten_module(bound.region, torch.float32)), tensors)


def generate(model, batch, form):
    return model.eval().generate(
        **batch, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None, cache_implementation=form
    )


@pytest.mark.parametrize("form", ["static", None])
def test_generation_is_that_of_atens_operators(form, model, batch, monkeypatch):
    found = compare_calls(monkeypatch, aten)
    generate(model, batch[0], form)
    assert found and all(torch.equal(one, other) for one, other in found)


def test_training_is_that_of_atens_operators(model, batch, monkeypatch):
    found = compare_calls(monkeypatch, aten)
    inputs, labels = batch
    model.train()(**inputs, labels=labels).loss.backward()
    assert found and all(torch.equal(one, other) for one, other in found)


def test_one_token_has_linear_layers_to_rounding(model, batch, monkeypatch):
    found = compare_calls(monkeypatch, one_token)
    generate(model, batch[0], "static")
    assert found and max(relative(one, other) for one, other in found if one.is_floating_point()) < 1e-5


def test_schemas_are_called_for_few_operators(model):
    bound = [*model.bound.values(), *model.cached("dynamic").bound.values(), *model.cached("static").bound.values()]
    left = {node.target for one in bound for node in one.eager.graph.nodes if isinstance(node.target, OpOverload)}
    assert {str(target) for target in left} <= {
        "aten.slice.Tensor",
        "aten.index.Tensor",
        "vlmbuild.attention_auto.default",
        "vlmbuild.mrope_cos_sin.default",
        "vlmbuild.mrope_rotate.default",
    }


def test_autocast_without_gradients_is_that_of_atens_operators():
    """Of weights so large that oneDNN multiplies them, and of smaller ones."""
    shapes = (3, 512), (512, 512), (8, 512)
    graph = Graph()
    states, large, small = (graph.placeholder(name) for name in ("states", "large", "small"))
    wide = graph.call_function(LINEAR, (states, large))
    graph.output((wide, graph.call_function(LINEAR, (wide, small))))
    region = Region("two layers", GraphModule(torch.nn.Module(), graph), (), ("",), shapes)
    tensors = tuple(torch.randn(shape) / 16 for shape in shapes)
    with torch.no_grad(), torch.autocast("cpu"):
        found = BoundRegion(region, torch.float32).run((), None, tensors, training=False)
        expected = interpret(aten_module(region, torch.float32), tensors)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert torch.equal(one, other)

"""Cleaning: what goes, what stays, and that values do not change."""

from __future__ import annotations

import torch

from vlmbuild.rewrite.simplify import drop_no_ops, inline_no_grad, simplify

aten = torch.ops.aten


def exported(function, *example):
    class Module(torch.nn.Module):
        def forward(self, *values):
            return function(*values)

    return torch.export.export(Module(), example, strict=False).graph_module


def targets(module):
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def test_no_grad_bodies_are_inlined():
    def function(x):
        with torch.no_grad():
            table = x.cos() * 2.0
        return x * table

    module = exported(function, torch.randn(3))
    assert inline_no_grad(module) == 1
    assert targets(module) == [aten.cos.default, aten.mul.Tensor, aten.mul.Tensor]
    assert not any(node.op == "get_attr" for node in module.graph.nodes)


def test_no_ops_go_and_others_stay():
    def function(x):
        kept = x.to(torch.bfloat16).float()[1:] * 2.0
        return kept.float()[:] * 1.0

    module = exported(function, torch.randn(3, 4))
    assert drop_no_ops(module) > 0
    names = [str(target) for target in targets(module)]
    assert names == ["aten.to.dtype", "aten.to.dtype", "aten.slice.Tensor", "aten.mul.Tensor"]


def test_integer_products_with_one_stay():
    module = exported(lambda x: x * 1.0, torch.arange(3))
    drop_no_ops(module)
    assert targets(module) == [aten.mul.Tensor]  # it makes floats of them


def test_device_casts_become_dtype_casts():
    module = exported(lambda x: x.to("cpu", torch.float64), torch.randn(3))
    simplify(module)
    assert targets(module) == [aten.to.dtype]
    assert not any(isinstance(value, torch.device) for node in module.graph.nodes for value in node.args)


def test_expansions_that_repeat_stay():
    def function(x):
        return x.expand(-1, 1).expand(3, 4), x.expand(2, 3, 1)

    module = exported(function, torch.randn(3, 1))
    drop_no_ops(module)
    module.recompile()
    assert targets(module) == [aten.expand.default] * 2
    assert [tuple(result.shape) for result in module(torch.randn(3, 1))] == [(3, 4), (2, 3, 1)]


def test_values_stay_and_second_time_does_nothing():
    def function(x):
        with torch.no_grad():
            scale = x.float().exp().to(x.dtype) * 1.0
        return (x[:, :] * scale).expand(-1, 4), x + 1.0

    values = torch.randn(3, 4)
    module = exported(function, values)
    before = module(values)
    assert simplify(module) > 0
    module.recompile()
    assert all(torch.equal(a, b) for a, b in zip(module(values), before, strict=True))
    assert simplify(module) == 0

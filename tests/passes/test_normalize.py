"""Normalizing the captured model: what goes, what stays, and exactly the same values."""

from __future__ import annotations

import pytest
import torch
from tiny import linear_region, make_region, operators, region_program

from vlmbuild.errors import CaptureError
from vlmbuild.ir.printer import digest
from vlmbuild.ir.program import COMPUTE_DTYPE, Region, Slot
from vlmbuild.passes import Normalize
from vlmbuild.rewrite.pass_manager import run
from vlmbuild.runtime.torch.region import BoundRegion


def test_leftovers_of_tracing_go(program):
    before = {name: operators(region) for name, region in program.regions.items()}
    assert any("_assert_tensor_metadata" in name for names in before.values() for name in names)
    (report,) = run([Normalize()], program, require=("normalize",))
    assert report.sites.keys() == program.regions.keys() - {"lm_head"}  # one projection, nothing left of tracing in it
    for region in program.regions.values():
        assert not any("_assert" in name or "to.device" in name for name in operators(region))
        for node in region.graph.graph.nodes:
            values = [*node.args, *node.kwargs.values()]
            assert not any(isinstance(value, torch.device) for value in values), node
        for node in region.graph.graph.nodes:
            if node.target is torch.ops.aten.to.dtype:
                assert node.args[0].meta["val"].dtype != node.args[1]  # every cast that is left casts


def test_meaningful_casts_stay(program):
    run([Normalize()], program)
    casts = [name for name in operators(program.regions["language_model.layers"]) if name == "aten.to.dtype"]
    assert len(casts) == 4  # into and out of float32, in both norms


def test_second_run_and_clean_graphs_are_left_alone(program):
    run([Normalize()], program)
    before = {name: digest(region) for name, region in program.regions.items()}
    assert run([Normalize()], program)[0].sites == {}
    assert {name: digest(region) for name, region in program.regions.items()} == before
    assert run([Normalize()], region_program(linear_region()))[0].sites == {}


def test_values_and_gradients_are_bit_identical():
    def forward(weight, values):
        wide = torch.ops.aten.dropout(values, 0.5, False).float().float()
        return ((weight.to(weight.dtype) * (wide * 1.0).to(values.dtype))[:, :],)

    slot = Slot("norm.weight", (8,), COMPUTE_DTYPE, "parameter", "language")
    region = make_region("blocks", forward, [slot], [("1", "tokens", 8)], ("blocks.0",))
    noisy = torch.fx.symbolic_trace(forward)
    run([Normalize()], region_program(region))
    weight, values = torch.randn(8, requires_grad=True), torch.randn(1, 5, 8, requires_grad=True)
    (ours,), (plain,) = BoundRegion(region, torch.float32, ()).graph(weight, values), noisy(weight, values)
    assert torch.equal(ours, plain)
    gradients = [torch.autograd.grad(result.square().sum(), (weight, values)) for result in (ours, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Model(torch.nn.Module):
    """A near miss: the mean over all values, of which artifacts may hold the mean over a dimension."""

    def __init__(self):
        super().__init__()
        self.norm = Norm()

    def forward(self, x):
        return self.norm(x)


class Norm(torch.nn.Module):
    def forward(self, x):
        return x * (x.mean(-1, keepdim=True) + x.mean())


def test_the_module_and_the_overloads_that_are_allowed_are_named():
    traced = torch.export.export(Model(), (torch.ones(3, 4),), strict=False)
    region = Region("blocks", traced.graph_module, (), ("blocks.0",), ((3, 4),))
    with pytest.raises(CaptureError, match=r"blocks .*aten\.mean\.default in norm \(Norm\).*aten\.mean\.dim alone"):
        run([Normalize()], region_program(region))


def test_an_operator_that_no_artifact_may_hold_is_named_at_once():
    slot = Slot("norm.weight", (8,), COMPUTE_DTYPE, "parameter", "language")
    region = make_region(
        "blocks", lambda weight, x: (weight * x.cumsum(1),), [slot], [("1", "tokens", 8)], ("blocks.0",)
    )
    with pytest.raises(CaptureError, match=r"blocks .*aten\.cumsum\.default"):
        run([Normalize()], region_program(region))

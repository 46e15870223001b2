"""Lowering attention: every site of the model, each backend, and the same values."""

from __future__ import annotations

import copy

import pytest
import torch
from parity import MODEL_FP32, assert_close
from tiny import linear_region, make_batch, operators, region_program

from vlmbuild.ir.printer import digest
from vlmbuild.passes import Normalize, SwapAttention
from vlmbuild.rewrite.pass_manager import run


@pytest.mark.parametrize("backend", ["auto", "sdpa", "triton"])
def test_every_site_gets_the_backend(program, backend):
    (_, report) = run([Normalize(), SwapAttention(backend)], program)
    assert report.sites == {"visual.blocks": 1, "language_model.layers": 1}
    assert report.matches == 5
    found = [name for region in program.regions.values() for name in operators(region) if "attention" in name]
    assert found == [f"vlmbuild.attention_{backend}.default"] * 2


def test_nothing_else_changes_and_second_run_finds_nothing(program):
    region = linear_region()
    before = digest(region)
    assert run([SwapAttention()], region_program(region))[0].sites == {}
    assert digest(region) == before
    run([SwapAttention()], program)
    assert run([SwapAttention("sdpa")], program)[0].sites == {}


def test_forward_and_gradients_stay(program, bind):
    run([Normalize()], program)
    lowered = copy.deepcopy(program)
    run([SwapAttention()], lowered)
    before, after = bind(program), bind(lowered)
    batch, labels = make_batch([[3, (1, 4, 6), 5, (1, 8, 2), 4], [9, (2, 2, 4), 2]])
    for model in (before, after):
        model(**batch, labels=labels).loss.backward()
    gradients = dict(before.named_parameters())
    assert any("visual" in name and p.grad.abs().sum() > 0 for name, p in after.named_parameters())
    for name, parameter in after.named_parameters():
        assert_close(parameter.grad, gradients[name].grad, MODEL_FP32, name)


def test_reference_operator_is_what_was_captured(program):
    nodes = [n for region in program.regions.values() for n in region.graph.graph.nodes]
    semantic = [n for n in nodes if n.target is torch.ops.vlmbuild.attention.default]
    assert len(semantic) == 2
    for node in semantic:
        _query, _key, _value, key_mask, cu_seqlens, key_groups, visible_groups, _causal, _scale = node.args
        assert key_mask is key_groups is visible_groups is None
        assert cu_seqlens.op == "placeholder"

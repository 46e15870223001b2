"""Deliberate breakages: which severity each gets and in which words, and that renaming and reordering are none."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import tiny
import torch

from vlmbuild.builder.tracing import trace
from vlmbuild.ir.program import Geometry, Input
from vlmbuild.locks.difference import SEVERITIES, compare
from vlmbuild.locks.make import lock_traced
from vlmbuild.recipe import QuantSpec, Recipe

aten = torch.ops.aten
LAYERS = "language_model.layers"
RECIPE = Recipe(attention="sdpa")


@pytest.fixture(scope="module")
def traced():
    return trace(tiny.config_values(), "tiny")


@pytest.fixture(scope="module")
def lock(traced):
    return lock_traced(traced, RECIPE, kernels=False)


@pytest.fixture
def broken(traced, lock):
    """Check after a change to the captured program."""

    def broken(change, recipe=RECIPE):
        program = copy.deepcopy(traced.program)
        change(program)
        return compare(lock, lock_traced(replace(traced, program=program), recipe, kernels=False))

    return broken


def nodes_of(program, target, region=LAYERS):
    return [node for node in program.regions[region].graph.graph.nodes if node.target is target]


def called(graph, target, *args, like, dtype=None):
    node = graph.call_function(target, args)
    value = like.meta["val"]
    node.meta["val"] = value if dtype is None else value.to(dtype)
    return node


def test_the_same_program_has_no_difference(broken):
    found = broken(lambda program: None)
    assert (found.findings, found.notes) == ((), ())


def three_inputs(program):
    """Turn cat((-x2, x1)) of the rotation into cat((-x2, x1's first part, x1's second part))."""
    for cat in nodes_of(program, aten.cat.default):
        negated, half = cat.args[0]
        graph = cat.graph
        width = half.meta["val"].shape[-1] // 2
        with graph.inserting_before(cat):
            parts = [graph.call_function(aten.slice.Tensor, (half, 3, start, start + width)) for start in (0, width)]
        for place, part in enumerate(parts):
            part.meta["val"] = half.meta["val"][..., place * width : (place + 1) * width]
        cat.args = ([negated, *parts], -1)


def test_a_pattern_that_no_longer_matches(broken):
    found = broken(three_inputs)
    texts = [finding.text for finding in found.of("fusion")]
    expected = f"fuse_rope matches 3 → 0 in {LAYERS}: pattern refused, `cat` has 3 inputs, the pattern has 2"
    assert expected in texts, texts
    # Its tables are rounded to the compute dtype again where they are made, and that is said, too.
    assert {finding.place for finding in found.of("numerics")} == {"language_model.embed_tokens", "visual.merger.ln_q"}
    assert any(finding.listing and finding.place == LAYERS for finding in found.of("fusion"))
    assert any("bytes moved" in finding.text and "(+" in finding.text for finding in found.of("cost"))


def widen_product(program):
    """Compute the gated product of the MLP in float32."""
    product = nodes_of(program, aten.mul.Tensor)[-1]
    graph = product.graph
    with graph.inserting_before(product):
        wide = called(graph, aten.to.dtype, product.args[0], torch.float32, like=product, dtype=torch.float32)
    with graph.inserting_after(product):
        narrow = called(graph, aten.to.dtype, product, torch.bfloat16, like=product)
    product.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not narrow)
    product.args = (wide, product.args[1])
    product.meta["val"] = product.meta["val"].float()


def test_a_widened_dtype(broken):
    found = broken(widen_product)
    (finding,) = found.of("numerics")
    assert finding.place == LAYERS
    assert "aten.mul.Tensor compute[1, sequence, 192] → f32[1, sequence, 192]" in finding.text
    assert [finding.text.partition(":")[0] for finding in found.of("cost")] == ["bytes moved"]
    assert found.worst == "numerics"


def test_a_lost_fusion(traced, lock):
    program = copy.deepcopy(traced.program)
    program.geometry = Geometry(rotary=())
    found = compare(lock, lock_traced(replace(traced, program=program), RECIPE, kernels=False))
    assert found.worst == "fusion"
    assert {finding.place for finding in found.of("fusion")} >= {LAYERS, "visual.blocks"}
    assert f"fuse_rope matches 3 → 0 in {LAYERS}" in [finding.text for finding in found.of("fusion")]


def test_an_added_graph_input(broken):
    def change(program):
        image = program.variants["image"]
        program.variants["image"] = replace(image, inputs=(*image.inputs, Input("extra", torch.int64, ("samples",))))

    found = broken(change)
    (finding,) = found.findings
    assert (finding.severity, finding.text) == ("interface", "input extra of variant image is new: i64[samples]")


def test_another_constant_changes_values(broken):
    def change(program):
        for node in nodes_of(program, aten.add.Tensor):
            if node.args[1] == 1e-5:
                node.args = (node.args[0], 1e-3)

    found = broken(change)
    assert found.worst == "numerics"
    assert found.findings[0].text == "the graph: aten.add.Tensor(%, 1e-05) → (%, 0.001)"


def test_order_of_independent_nodes_is_no_difference(broken):
    moved = []

    def change(program):
        for region in program.regions.values():
            graph = region.graph.graph
            for node in list(graph.nodes):
                following = node.next
                if node.op == following.op == "call_function" and node not in following.all_input_nodes:
                    following.append(node)
                    moved.append(node)
            graph.lint()

    assert broken(change).findings == ()
    assert len(moved) > 10


def test_order_of_slots_and_activations_is_no_difference(broken):
    """Which parameter a trace meets first follows from the order of nodes, too."""

    def change(program):
        for name, region in program.regions.items():
            placeholders, count = region.placeholders(), len(region.slots)
            for node in [*placeholders[:count], *placeholders[count:]][::-1]:
                next(iter(region.graph.graph.nodes)).prepend(node)
            ordered = [*reversed(placeholders[:count]), *reversed(placeholders[count:])]
            for node in reversed(ordered):
                next(iter(region.graph.graph.nodes)).prepend(node)
            region.slots, region.activations = region.slots[::-1], region.activations[::-1]
            for key, variant in program.variants.items():
                calls = [replace(c, inputs=c.inputs[::-1]) if c.region == name else c for c in variant.calls]
                program.variants[key] = replace(variant, calls=tuple(calls))

    assert broken(change).findings == ()


def test_renamed_nodes_are_no_difference(broken):
    def change(program):
        for region in program.regions.values():
            for number, node in enumerate(region.graph.graph.nodes):
                node.name = f"renamed_{number}"

    assert broken(change).findings == ()


def test_another_recipe_changes_values(traced, lock):
    found = compare(lock, lock_traced(traced, Recipe(attention="sdpa", quantize=QuantSpec()), kernels=False))
    texts = [finding.text for finding in found.of("numerics")]
    assert "pass quantize_linear is new" in texts
    assert "self_attn.q_proj.weight is stored as the compute dtype → nf4, blocks of 64, scales in 8 bits" in texts


def test_another_depth_is_said_in_counts(traced, lock):
    deeper = trace(tiny.config_values(layers=4), "tiny")
    found = compare(lock, lock_traced(deeper, RECIPE, kernels=False))
    assert f"{LAYERS} occurs 3 → 4 times" in [finding.text for finding in found.of("numerics")]
    assert len(lock_traced(deeper, RECIPE, kernels=False).to_text()) < 1.01 * len(lock.to_text())


def test_other_versions_are_said_and_noise_is_left_out(traced, lock, broken):
    older = replace(lock, versions={**lock.versions, "torch": "2.11.0"})
    noisy = {name: replace(region, graph="other\n", flops="1") for name, region in lock.regions.items()}
    found = compare(replace(older, regions=noisy), lock)
    assert found.findings == ()
    assert "torch 2.11.0 → " in found.notes[0]
    program = copy.deepcopy(traced.program)
    three_inputs(program)
    lost = compare(older, lock_traced(replace(traced, program=program), RECIPE, kernels=False))
    assert lost.of("fusion")  # matches are compared all the same


def test_findings_stand_by_severity(broken):
    found = broken(lambda program: (three_inputs(program), widen_product(program)))
    ranks = [SEVERITIES.index(finding.severity) for finding in found.findings]
    assert ranks == sorted(ranks)

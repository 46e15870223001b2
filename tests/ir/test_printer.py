"""Graphs as text: independent of names and order."""

from __future__ import annotations

import torch
from tiny import linear_region
from torch.fx import Graph, GraphModule

from vlmbuild.ir.printer import dataflow_order, digest, program_text, region_text
from vlmbuild.ir.serialize import from_json, to_json

EXPECTED = """\
  proj.weight: compute[64, 128] parameter language
  proj.bias: compute[64] parameter language
  in0: compute[1, tokens, 128]
  %0: compute[1, tokens, 64] = aten.linear.default(in0, proj.weight, proj.bias)
  return [%0]"""


def test_text_of_a_region():
    assert region_text(linear_region()) == EXPECTED


def two_branches(swapped):
    """Build relu(x) + neg(x), with the branches inserted in one order or the other, and other node names."""
    region = linear_region(bias=False)
    graph = Graph()
    first = graph.placeholder("weight" if swapped else "w")
    values = graph.placeholder("x")
    for node, old in zip((first, values), region.placeholders(), strict=True):
        node.meta = dict(old.meta)
    aten = torch.ops.aten
    operators = (aten.relu.default, aten.neg.default)
    made = {op: graph.call_function(op, (values,)) for op in (reversed(operators) if swapped else operators)}
    total = graph.call_function(aten.add.Tensor, (made[operators[0]], made[operators[1]]))
    dead = graph.call_function(aten.cos.default, (values,))
    graph.output((total,))
    assert dead not in graph.output_node().all_input_nodes
    region.graph = GraphModule(torch.nn.Module(), graph)
    return region


def test_renaming_and_reordering_change_nothing():
    assert region_text(two_branches(True)) == region_text(two_branches(False))
    assert digest(two_branches(True)) == digest(two_branches(False))
    assert [node.target for node in dataflow_order(two_branches(True))][:2] == [
        torch.ops.aten.relu.default,
        torch.ops.aten.neg.default,
    ]


def test_arguments_do_change_it():
    region = linear_region()
    before = digest(region)
    (result,) = region.results()
    result.args = (*result.args[:2],)
    assert digest(region) != before


def test_keywords_print_in_one_order():
    texts = []
    for keywords in ({"approximate": "tanh", "extra": 1}, {"extra": 1, "approximate": "tanh"}):
        region = linear_region()
        (result,) = region.results()
        result.kwargs = keywords
        texts.append(region_text(region))
    assert texts[0] == texts[1]
    assert "approximate='tanh', extra=1)" in texts[0]


def test_program_text_does_not_grow_with_depth(built):
    text = program_text(built)
    assert "language_model.layers x 3" in text
    assert text.count("self_attn.q_proj.weight: ") == 1
    assert "device" not in text
    assert "s43" not in text


def test_a_digest_without_shapes_does_not_depend_on_them(built):
    """The digest that ties compiled code to its graph is the same for an annotated program and for one read from a file."""
    stored = from_json(to_json(built))
    assert {digest(region) for region in built.regions.values()}.isdisjoint(map(digest, stored.regions.values()))
    for name, region in built.regions.items():
        assert digest(region, shapes=False) == digest(stored.regions[name], shapes=False)

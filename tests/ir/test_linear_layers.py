"""Linear layers: found once per instance, plain and quantized alike, with their place in the block."""

from __future__ import annotations

import copy

from tiny import linear_region, region_program

from vlmbuild.ir.linear_layers import LinearLayer, linear_layers, linear_sites
from vlmbuild.ops import PLAIN_LINEAR
from vlmbuild.passes import QuantizeLinear
from vlmbuild.quant.decide import Decision
from vlmbuild.quant.nf4 import NF4
from vlmbuild.rewrite.pass_manager import run


def test_each_instance_has_its_layer():
    program = region_program(linear_region())
    assert list(linear_layers(program)) == [
        LinearLayer(f"blocks.{number}.proj", "language", (64, 128), "other", number) for number in range(2)
    ]


def test_a_quantized_layer_is_still_one():
    program = region_program(linear_region())
    before = list(linear_layers(program))
    decision = Decision(NF4())
    run([QuantizeLinear({layer.module: decision for layer in before})], program)
    assert list(linear_layers(program)) == before
    assert list(linear_layers(program, (PLAIN_LINEAR,))) == []


def test_a_shared_weight_is_marked(built):
    layers = {layer.module: layer for layer in linear_layers(built)}
    assert layers["model.language_model.embed_tokens"].shared  # the head of a tied model
    assert not any(layer.shared for module, layer in layers.items() if "layers." in module)
    assert {layer.part for layer in layers.values()} == {"attention", "mlp", "other"}


def test_a_computed_weight_is_no_layer():
    region = copy.deepcopy(linear_region())
    (site,) = linear_sites(region)
    assert site.module == "proj" and site.shape == (64, 128)
    graph = region.graph.graph
    with graph.inserting_before(site.node):
        doubled = graph.call_method("abs", (site.node.args[1],))
    site.node.args = (site.node.args[0], doubled, *site.node.args[2:])
    assert linear_sites(region) == []

"""Shapes from inputs alone equal the captured ones."""

from __future__ import annotations

import json

import torch

from vlmbuild.ir.dims import shape_json
from vlmbuild.ir.printer import program_text
from vlmbuild.ir.serialize import from_json, to_json
from vlmbuild.ir.shapes import Shapes


def test_a_loaded_program_prints_as_the_captured_one(built):
    loaded = from_json(json.loads(json.dumps(to_json(built))))
    assert program_text(loaded) != program_text(built)
    shapes = Shapes(loaded)
    for region in loaded.regions.values():
        shapes.annotate(region)
    assert program_text(loaded) == program_text(built)
    assert [region.activations for region in loaded.regions.values()] == [r.activations for r in built.regions.values()]


def test_only_what_is_wanted_is_run(built):
    shapes = Shapes(built, {"language_model.layers"})
    assert "language_model.layers" in shapes.values and not any("visual" in name for name in shapes.values)


def test_graphs_are_left_alone(built):
    before = {id(node): dict(node.meta) for region in built.regions.values() for node in region.graph.graph.nodes}
    shapes = Shapes(built)
    after = {id(node): dict(node.meta) for region in built.regions.values() for node in region.graph.graph.nodes}
    assert before == after
    region = built.regions["language_model.layers"]
    value = shapes.values[region.name][region.results()[0]]
    assert shape_json(shapes.sizes(value)) == [1, "sequence", 256] and value.dtype == torch.bfloat16

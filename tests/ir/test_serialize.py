"""Stored programs: round trip, and nothing but an IncompatibleError for anything malformed."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build, make_region, region_program

from vlmbuild.errors import IncompatibleError
from vlmbuild.ir.printer import program_text, region_text
from vlmbuild.ir.serialize import OPERATORS, from_json, to_json
from vlmbuild.recipe import QuantSpec


@pytest.fixture(scope="module")
def stored(pristine_program):
    return to_json(build(pristine_program, quantize=QuantSpec()))


def test_round_trip(stored):
    text = json.dumps(stored)
    assert to_json(from_json(json.loads(text))) == stored


def test_loaded_program_is_the_same_apart_from_shapes(built):
    loaded = from_json(to_json(built))
    assert loaded.variants == built.variants
    assert loaded.geometry == built.geometry
    assert loaded.ties == built.ties
    for name, region in loaded.regions.items():
        assert (region.slots, region.instances) == (built.regions[name].slots, built.regions[name].instances)
        assert region.activations == built.regions[name].activations
    assert without_types(program_text(loaded)) == without_types(program_text(built))


def without_types(text):
    return re.sub(r"^  (%\d+|in\d+): \w+\[[^]]*\]", r"  \1", text, flags=re.MULTILINE)


def test_floats_and_keywords_come_back_exactly():
    def forward(values):
        return (torch.nn.functional.gelu(values * 0.1 + 1e-300, approximate="tanh") - float("inf"),)

    region = make_region("blocks", forward, (), [("1", "tokens", 8)], ("blocks.0",))
    loaded = from_json(json.loads(json.dumps(to_json(region_program(region))))).regions["blocks"]
    assert "approximate='tanh'" in region_text(region)
    assert "mul.Tensor(in0, 0.1)" in region_text(region)
    assert without_types(region_text(loaded)) == without_types(region_text(region))


def test_allow_list_is_of_pure_operators():
    names = " ".join(OPERATORS)
    for word in ("load", "exec", "eval", "import", "open", "system", "set_", "copy_", "resize", "from_file"):
        assert word not in names


def changed(stored, *path_and_value):
    *path, key, value = path_and_value
    values = copy.deepcopy(stored)
    place = values
    for step in path:
        place = place[step]
    place[key] = value
    return values


@pytest.mark.parametrize(
    "change",
    [
        ("schema", "vlmbuild.program/1"),
        ("regions", 0, "nodes", 0, "op", "aten.load"),
        ("regions", 0, "nodes", 0, "op", "os.system"),
        ("regions", 0, "nodes", 0, "op", "__import__"),
        ("regions", 0, "nodes", 0, "args", [{"node": 10**6}]),
        ("regions", 0, "nodes", 0, "args", [{"code": "1"}]),
        ("regions", 0, "nodes", 0, "args", [{"dtype": "float8"}]),
        ("regions", 0, "nodes", 0, "args", [{"float": "import os"}]),
        ("regions", 0, "nodes", 0, "kwargs", {"a);import os;(": 1}),
        ("regions", 0, "slots", 0, "name", "__class__"),
        ("regions", 0, "slots", 0, "name", "forward"),
        ("regions", 0, "slots", 0, "name", "a..b"),
        ("regions", 0, "slots", 0, "name", "a.__dict__.b"),
        ("regions", 0, "slots", 0, "dtype", "object"),
        ("regions", 0, "slots", 0, "kind", "code"),
        ("regions", 0, "slots", 0, "role", "root"),
        ("regions", 1, "instances", ["model.__class__.0"]),
        ("regions", 0, "slots", None),
        ("variants", {"image": {}}),
        ("rotary", [{}]),
        ("variants", "image", "calls", 0, "instance", "model.visual.blocks.9"),
        ("variants", "image", "calls", 0, "region", "no region"),
        ("variants", "image", "calls", 1, "inputs", 0, "v99"),
        ("variants", "image", "output", "v99"),
        ("ties", {"lm_head.weight": "model.nothing"}),
        ("ties", {"forward": "model.language_model.embed_tokens.weight"}),
    ],
    ids=lambda change: ".".join(map(str, change))[:50],
)
def test_malformed_programs_are_refused(stored, change):
    with pytest.raises(IncompatibleError):
        from_json(changed(stored, *change))


@pytest.mark.parametrize("name", ["aten.relu.default", "os.system", "aten.linear.out", "vlmbuild.linear_4bit", ""])
def test_operators_outside_the_list_are_named(stored, name):
    with pytest.raises(IncompatibleError, match=f"calls '{name}', which this vlmbuild does not allow"):
        from_json(changed(stored, "regions", 0, "nodes", 0, "op", name))


def test_operator_outside_the_list_cannot_be_stored():
    region = make_region("blocks", lambda values: (values.relu(),), (), [("1", "tokens", 8)], ("blocks.0",))
    with pytest.raises(IncompatibleError, match="operator aten.relu.default may not be stored"):
        to_json(region_program(region))


def places(value, path=()):
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.sampled_from(["__class__", "forward", "a b", {"node": -1}, {"node": "x"}, [[[]]], {"float": "nan"}]),
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutations_load_or_are_refused(stored, data):
    path = data.draw(st.sampled_from([path for path in places(stored) if path]))
    values = changed(stored, *path, data.draw(JUNK))
    try:
        program = from_json(values)
    except IncompatibleError:
        return
    to_json(program)

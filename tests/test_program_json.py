"""Stored programs: round trip, and nothing but an IncompatibleError for anything malformed."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build

from vlmbuild.errors import IncompatibleError
from vlmbuild.graph_text import program_text
from vlmbuild.program_json import OPERATORS, from_json, to_json
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
    assert len(program_text(loaded).splitlines()) == len(program_text(built).splitlines())


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
        ("schema", "vlmbuild.program/2"),
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
    ],
    ids=lambda change: ".".join(map(str, change))[:50],
)
def test_malformed_programs_are_refused(stored, change):
    with pytest.raises(IncompatibleError):
        from_json(changed(stored, *change))


def places(value, path=()):
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.text(max_size=8), st.just([]), st.just({}),
    st.sampled_from(["__class__", "forward", "a b", {"node": -1}, {"node": "x"}, [[[]]], {"float": "nan"}]),
)  # fmt: skip


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

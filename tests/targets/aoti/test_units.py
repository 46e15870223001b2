"""What there is to compile: names that come back, graphs that are compiled once, and where a row for every token is."""

import pytest

from vlmbuild.ir.dims import parse_shape
from vlmbuild.ir.shapes import annotate_shapes
from vlmbuild.kv_cache.program import with_cache
from vlmbuild.runtime.aoti.code_index import compiled_regions
from vlmbuild.targets.aoti.units import Unit, distinct_units, of_one_token, token_axis


@pytest.mark.parametrize("unit", [Unit("dynamic", "visual.blocks"), Unit("static", "layers.cached", one_token=True)])
def test_names_come_back(unit):
    assert Unit.parse(str(unit)) == unit


def test_files_are_distinct():
    unit = Unit("dynamic", "layers")
    assert {unit.file, unit.of_token().file, Unit("static", "layers").file} == {
        "dynamic/layers.pt2",
        "dynamic/layers.token.pt2",
        "static/layers.pt2",
    }


def test_a_graph_that_two_forms_share_is_compiled_once():
    units = distinct_units({"dynamic": {"a": "1", "b": "2"}, "static": {"a": "1", "b": "3"}})
    assert units == {"1": Unit("dynamic", "a"), "2": Unit("dynamic", "b"), "3": Unit("static", "b")}


@pytest.mark.parametrize(
    ("size", "one"),
    [
        (4, 4),
        ("batch", 1),
        ("batch*new", 1),
        ("new*batch", 1),
        ("past + new", "past + 1"),
        ("4*images", "4*images"),
        ("2*batch", 2),
        ("batch + new", 2),
    ],
)
def test_sizes_of_one_token(size, one):
    assert of_one_token((parse_shape((size, 8)),)) == (parse_shape((one, 8)),)


@pytest.mark.parametrize("form", ["dynamic", "static"])
def test_a_row_for_every_token_is_found(built, form):
    """In blocks of text, and only there."""
    program = with_cache(built, form)
    annotate_shapes(program)
    for name, region in compiled_regions(program).items():
        found = token_axis(region, form)
        if name.startswith("visual"):
            assert found is None
        else:
            place, axis = found
            assert of_one_token(region.activations)[place][axis] == 1

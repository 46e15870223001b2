"""Compilation units of a program: each graph once, graphs of one-token steps twice."""

import pytest

from vlmbuild.ir.dims import parse_shape
from vlmbuild.runtime.aoti.code_index import CodeFile, CodeIndex, compiled_regions
from vlmbuild.runtime.aoti.platform import this_platform
from vlmbuild.targets.aoti.plan import CodePlan, Unit, of_one_token, token_axis


def test_a_single_token_gets_code_of_its_own_where_it_is_written_in_place(programs):
    block = "language_model.layers.cached"
    assert CodePlan.of(programs).weights.keys() == {
        Unit("dynamic", "visual.blocks"),
        Unit("dynamic", block),
        Unit("static", block),
        Unit("static", block).of_token(),
    }


def test_the_index_has_every_region_in_every_form(programs):
    made = CodePlan.of(programs)
    files = {unit: CodeFile(unit.file, ()) for unit in made.weights}
    index = made.index(this_platform(levels=False), "float32", files)
    assert CodeIndex.from_record(index.record()) == index
    assert {form: regions.keys() for form, regions in index.regions.items()} == {
        form: named.keys() for form, named in made.graphs.items()
    }
    entry = index.regions["static"]["language_model.layers.cached"]
    assert entry.token == CodeFile("static/language_model.layers.cached.token.pt2", ())
    assert index.regions["dynamic"]["language_model.layers.cached"].token is None


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
def test_a_row_for_every_token_is_found(programs, form):
    """In blocks of text, and only there."""
    for name, region in compiled_regions(programs[form]).items():
        found = token_axis(region, form)
        if name.startswith("visual"):
            assert found is None
        else:
            place, axis = found
            assert of_one_token(region.activations)[place][axis] == 1

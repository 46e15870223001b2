"""What is compiled for a program: each graph once, steps of one token twice."""

from vlmbuild.ir.serialize import from_json, to_json
from vlmbuild.runtime.aoti.code_index import CodeFile, CodeIndex
from vlmbuild.runtime.aoti.platform import this_platform
from vlmbuild.targets.aoti.plan import CodePlan, cached_programs
from vlmbuild.targets.aoti.units import Unit

PLATFORM = this_platform(levels=False)


def plan(built):
    return CodePlan.of(cached_programs(from_json(to_json(built))), PLATFORM, "g++ 12")


def test_a_single_token_gets_code_of_its_own_where_it_is_written_in_place(built):
    block = "language_model.layers.cached"
    assert plan(built).weights.keys() == {
        Unit("dynamic", "visual.blocks"),
        Unit("dynamic", block),
        Unit("static", block),
        Unit("static", block).of_token(),
    }


def test_it_comes_back_from_json(built):
    made = plan(built)
    assert CodePlan.from_record(made.record()) == made


def test_the_index_has_every_region_in_every_form(built):
    made = plan(built)
    files = {unit: CodeFile(unit.file, ()) for unit in made.weights}
    index = made.index("float32", files)
    assert CodeIndex.from_record(index.record()) == index
    assert {form: regions.keys() for form, regions in index.regions.items()} == {
        form: named.keys() for form, named in made.graphs.items()
    }
    entry = index.regions["static"]["language_model.layers.cached"]
    assert entry.token == CodeFile("static/language_model.layers.cached.token.pt2", ())
    assert index.regions["dynamic"]["language_model.layers.cached"].token is None

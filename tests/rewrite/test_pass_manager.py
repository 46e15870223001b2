"""The runner holds passes to their contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import linear_region, region_program

from vlmbuild.errors import PassError, UsageError
from vlmbuild.passes import Normalize
from vlmbuild.rewrite.pass_manager import PassOutcome, refresh, run


@dataclass(frozen=True)
class Scripted:
    """Changes what it is told to, and counts what it is told to."""

    change: tuple[str, ...] = ()
    count: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    error: Exception | None = None

    name: ClassVar[str] = "scripted"
    exact: ClassVar[bool] = True

    def __call__(self, program):
        if self.error is not None:
            raise self.error
        outcome = PassOutcome()
        for name in self.change:
            region = program.regions[name]
            (result,) = region.results()
            with region.graph.graph.inserting_after(result):
                doubled = region.graph.graph.call_function(torch.ops.aten.mul.Tensor, (result, 2.0))
            region.graph.graph.output_node().args = ((doubled,),)
        for name in self.count:
            outcome.add(name, 1)
        for reason in self.refusals:
            outcome.add("blocks", 0, [reason])
        return outcome


@pytest.fixture
def program():
    return region_program(linear_region())


def test_report_counts_instances(program):
    seen = []
    (report,) = run([Scripted(("blocks",), ("blocks",), ("why not",))], program, on_pass=seen.append)
    assert (report.sites, report.matches, report.refusals) == ({"blocks": 1}, 2, ("blocks: why not",))
    assert seen == [report]
    assert report.record() == {"name": "scripted", "matches": 2, "refusals": ["blocks: why not"]}


def test_shapes_are_refreshed(program):
    run([Scripted(("blocks",), ("blocks",))], program)
    (result,) = program.regions["blocks"].results()
    assert tuple(result.meta["val"].shape)[2] == 64


def test_change_without_count_is_an_error(program):
    with pytest.raises(PassError, match=r"changed \['blocks'\] but counted nothing"):
        run([Scripted(change=("blocks",))], program)


def test_count_without_change_is_an_error(program):
    with pytest.raises(PassError, match=r"changed nothing but counted \['blocks'\]"):
        run([Scripted(count=("blocks",))], program)


def test_failure_names_the_pass_and_those_before(program):
    with pytest.raises(PassError, match=r"Pass scripted failed \(passes already run: normalize\): boom") as caught:
        run([Normalize(), Scripted(error=UsageError("boom"))], program)
    assert isinstance(caught.value.__cause__, UsageError)


@dataclass(frozen=True)
class Misplacing:
    """Uses a value before it is computed."""

    name: ClassVar[str] = "misplacing"
    exact: ClassVar[bool] = True

    def __call__(self, program):
        graph = program.regions["blocks"].graph.graph
        (result,) = program.regions["blocks"].results()
        with graph.inserting_before(result):
            early = graph.call_function(torch.ops.aten.neg.default, (result,))
        graph.output_node().args = ((early,),)
        outcome = PassOutcome()
        outcome.add("blocks", 1)
        return outcome


def test_invalid_graph_is_an_error(program):
    with pytest.raises(PassError, match="Pass misplacing failed .*before it has been defined"):
        run([Misplacing()], program)


def test_required_pass_without_matches_gives_the_reasons(program):
    with pytest.raises(PassError, match=r"Required pass scripted matched nothing \(blocks: three inputs\)"):
        run([Scripted(refusals=("three inputs",))], program, require=("scripted",))


def test_unknown_required_pass_lists_the_known(program):
    with pytest.raises(PassError, match="'fuse_rope' .* normalize, scripted"):
        run([Normalize(), Scripted()], program, require=("fuse_rope",))


def test_refresh_drops_dead_nodes(program):
    region = program.regions["blocks"]
    with region.graph.graph.inserting_before(region.results()[0]):
        region.graph.graph.call_function(torch.ops.aten.neg.default, (region.placeholders()[-1],))
    refresh(region)
    assert not any(node.target is torch.ops.aten.neg.default for node in region.graph.graph.nodes)

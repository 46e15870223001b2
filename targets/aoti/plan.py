"""Plan of an artifact's code: the regions of its programs with a cache, each distinct graph compiled once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from vlmbuild.ir.printer import digest
from vlmbuild.ir.program import Program
from vlmbuild.ir.shapes import annotate_shapes
from vlmbuild.kv_cache.block import FORMS, CacheForm
from vlmbuild.kv_cache.program import with_cache
from vlmbuild.runtime.aoti.code_index import CodeEntry, CodeFile, CodeIndex, compiled_regions
from vlmbuild.runtime.aoti.platform import CodePlatform
from vlmbuild.targets.aoti.units import Unit, distinct_units, token_axis


@dataclass(frozen=True, slots=True)
class CodePlan:
    """Units to compile, and the platform that they are compiled for.

    Attributes:
        platform: Requirements of the code.
        compiler: Name and version of the C++ compiler; other ones make other bytes.
        graphs: Form of the cache -> region -> digest of its graph.
        units: Digest -> the unit that is compiled from the graph.
        axes: Digest -> index and axis of an activation that has a row for every token; of graphs that get a second
            unit, for a single token.
        weights: Unit -> how much there is to compile, in any measure.
    """

    platform: CodePlatform
    compiler: str
    graphs: Mapping[CacheForm, Mapping[str, str]]
    units: Mapping[str, Unit]
    axes: Mapping[str, tuple[int, int]]
    weights: Mapping[Unit, int]

    @classmethod
    def of(cls, programs: Mapping[CacheForm, Program], platform: CodePlatform, compiler: str) -> Self:
        """Plan the code of programs; annotates their regions with shapes."""
        graphs = {
            form: {name: digest(region, shapes=False) for name, region in compiled_regions(program).items()}
            for form, program in programs.items()
        }
        for program in programs.values():
            annotate_shapes(program)
        units = distinct_units(graphs)
        regions = {graph: programs[unit.form].regions[unit.region] for graph, unit in units.items()}
        axes = {graph: token_axis(regions[graph], units[graph].form) for graph in graphs["static"].values()}
        found = {graph: axis for graph, axis in axes.items() if axis is not None}
        weights = {units[graph]: len(region.graph.graph.nodes) for graph, region in regions.items()}
        weights |= {units[graph].of_token(): weights[units[graph]] for graph in found}
        return cls(platform, compiler, graphs, units, found, weights)

    def index(self, dtype: str, files: Mapping[Unit, CodeFile]) -> CodeIndex:
        """Build the artifact's index from the file of each unit."""
        entries = {
            graph: CodeEntry(graph, files[unit], files.get(unit.of_token()), self.axes.get(graph))
            for graph, unit in self.units.items()
        }
        regions: dict[str, Mapping[str, CodeEntry]] = {
            form: {name: entries[graph] for name, graph in named.items()} for form, named in self.graphs.items()
        }
        return CodeIndex(self.platform, dtype, regions)

    def record(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON."""
        return {
            "platform": self.platform.record(),
            "compiler": self.compiler,
            "graphs": self.graphs,
            "units": {graph: str(unit) for graph, unit in self.units.items()},
            "axes": self.axes,
            "weights": {str(unit): weight for unit, weight in self.weights.items()},
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Read a plan from its `record`."""
        return cls(
            CodePlatform.from_record(record["platform"]),
            record["compiler"],
            record["graphs"],
            {graph: Unit.parse(unit) for graph, unit in record["units"].items()},
            {graph: (index, axis) for graph, (index, axis) in record["axes"].items()},
            {Unit.parse(unit): weight for unit, weight in record["weights"].items()},
        )


def cached_programs(program: Program) -> dict[CacheForm, Program]:
    """Return the programs whose regions are compiled, by the form of their cache."""
    return {form: with_cache(program, form) for form in FORMS}

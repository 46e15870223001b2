"""Units of compilation: each distinct graph of the programs with a cache once, and graphs with tokens again for a single
token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from vlmbuild.ir.dims import Dim, Shape
from vlmbuild.ir.printer import digest
from vlmbuild.ir.program import Program, Region
from vlmbuild.ir.shapes import annotate_shapes
from vlmbuild.kv_cache.block import FORMS, CacheForm
from vlmbuild.kv_cache.program import TOKENS, with_cache
from vlmbuild.ops import PLAIN_LINEAR
from vlmbuild.runtime.aoti.code_index import CodeEntry, CodeFile, CodeIndex, compiled_regions
from vlmbuild.runtime.aoti.platform import CodePlatform

_TOKENS: Mapping[CacheForm, Dim] = {"dynamic": TOKENS, "static": Dim.named("batch")}
"""The number of tokens of a call."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One package.

    Attributes:
        form: Form of the cache.
        region: Name.
        one_token: True for a single token of a single row alone.
    """

    form: CacheForm
    region: str
    one_token: bool = False

    def of_token(self) -> Unit:
        """Return the unit of the same region for a single token."""
        return replace(self, one_token=True)

    @property
    def file(self) -> str:
        """Below the folder of a platform."""
        return f"{self.form}/{self.region}{'.token' if self.one_token else ''}.pt2"


@dataclass(frozen=True, slots=True)
class CodePlan:
    """Units to compile.

    Attributes:
        graphs: Form of the cache -> region -> digest of its graph.
        units: Digest -> the unit that is compiled from the graph.
        axes: Digest -> index and axis of an activation that has a row for every token; of graphs that get a second
            unit, for a single token.
        weights: Unit -> how much there is to compile, in any measure.
    """

    graphs: Mapping[CacheForm, Mapping[str, str]]
    units: Mapping[str, Unit]
    axes: Mapping[str, tuple[int, int]]
    weights: Mapping[Unit, int]

    @classmethod
    def of(cls, programs: Mapping[CacheForm, Program]) -> Self:
        """Plan the code of `cached_programs`."""
        graphs = {
            form: {name: digest(region, shapes=False) for name, region in compiled_regions(program).items()}
            for form, program in programs.items()
        }
        units: dict[str, Unit] = {}
        for form, named in graphs.items():
            for name, graph in named.items():
                units.setdefault(graph, Unit(form, name))
        regions = {graph: programs[unit.form].regions[unit.region] for graph, unit in units.items()}
        axes = {graph: token_axis(regions[graph], units[graph].form) for graph in graphs["static"].values()}
        found = {graph: axis for graph, axis in axes.items() if axis is not None}
        weights = {units[graph]: len(region.graph.graph.nodes) for graph, region in regions.items()}
        weights |= {units[graph].of_token(): weights[units[graph]] for graph in found}
        return cls(graphs, units, found, weights)

    def index(self, platform: CodePlatform, dtype: str, files: Mapping[Unit, CodeFile]) -> CodeIndex:
        """Build the artifact's index from the file of each unit."""
        entries = {
            graph: CodeEntry(graph, files[unit], files.get(unit.of_token()), self.axes.get(graph))
            for graph, unit in self.units.items()
        }
        regions: dict[str, Mapping[str, CodeEntry]] = {
            form: {name: entries[graph] for name, graph in named.items()} for form, named in self.graphs.items()
        }
        return CodeIndex(platform, dtype, regions)


def cached_programs(program: Program) -> dict[CacheForm, Program]:
    """Return the programs whose regions are compiled, with shapes, by the form of their cache."""
    programs = {form: with_cache(program, form) for form in FORMS}
    for cached in programs.values():
        annotate_shapes(cached)
    return programs


def token_axis(region: Region, form: CacheForm) -> tuple[int, int] | None:
    """Return index and axis of an activation that has a row for every token; None where a region has no tokens, or no plain
    linear layers: these are faster in code for one token."""
    if all(node.target is not PLAIN_LINEAR for node in region.graph.graph.nodes):
        return None
    for index, shape in enumerate(region.activations):
        for axis, size in enumerate(shape):
            if size == _TOKENS[form]:
                return index, axis
    return None


def of_one_token(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Specialize shapes to one token of one row: ("batch", "batch*new", "past + new") -> (1, 1, "past + 1")."""
    one = {"batch": 1, "new": 1}
    return tuple(tuple(size.substitute(one) if isinstance(size, Dim) else size for size in shape) for shape in shapes)

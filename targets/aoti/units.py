"""Units of compilation: each distinct region once, and regions with tokens again for a single token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from vlmbuild.ir.dims import Dim, Shape
from vlmbuild.ir.program import Region
from vlmbuild.kv_cache.block import CacheForm
from vlmbuild.kv_cache.program import TOKENS
from vlmbuild.ops import PLAIN_LINEAR

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

    def __str__(self) -> str:
        return f"{self.form}:{self.region}{':token' if self.one_token else ''}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the text of `str(unit)`."""
        form, region, *rest = text.split(":")
        return cls(form, region, bool(rest))  # type: ignore[arg-type]

    def of_token(self) -> Unit:
        """Return the unit of the same region for a single token."""
        return replace(self, one_token=True)

    @property
    def file(self) -> str:
        """Below the folder of a platform."""
        return f"{self.form}/{self.region}{'.token' if self.one_token else ''}.pt2"


def distinct_units(graphs: Mapping[CacheForm, Mapping[str, str]]) -> dict[str, Unit]:
    """Map each distinct graph to one unit.

    Args:
        graphs: Form -> region -> digest of its graph.
    """
    found: dict[str, Unit] = {}
    for form, named in graphs.items():
        for name, graph in named.items():
            found.setdefault(graph, Unit(form, name))
    return found


def token_axis(region: Region, form: CacheForm) -> tuple[int, int] | None:
    """Return index and axis of an activation that has a row for every token; None where a region has no tokens, or no plain
    linear layers: these are faster in code for one token.

    Args:
        region: Region with shapes.
        form: Form of its program's cache.
    """
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

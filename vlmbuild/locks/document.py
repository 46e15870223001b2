"""The lock: what a compiled program is, as one text file that is the same on every machine.

The values of config.json are part of it, so a lock is checked by itself: without the checkpoint, the hub, or the path that
it was made from. What names a machine or a tool in config.json is left out.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vlmbuild.errors import UsageError
from vlmbuild.locks.toml_text import Row, to_toml
from vlmbuild.recipe import Recipe

SCHEMA = "vlmbuild.lock/1"
SUFFIX = ".lock"
_HEAD = """\
# What vlmbuild compiles from a model and a recipe. Made by `vlmbuild lock`, held against the code by `vlmbuild check`.
# FLOPs and bytes are those of one instance, as formulas of the dimensions; attention counts a packed row as one segment.
"""
_TABLES = ("versions", "interface", "dimensions", "prologue", "variants")


@dataclass(frozen=True, slots=True)
class LockedRegion:
    """A region.

    Attributes:
        instances: How often it occurs.
        flops, bytes: Formulas of the dimensions, for one instance (`vlmbuild.locks.cost`).
        operators: Name -> how many in the graph.
        weights: Source tensor -> format, of those that are not stored as they are.
        graph: Its listing (`vlmbuild.graph_text.region_text`), in canonical order.
    """

    instances: int
    flops: str
    bytes: str
    operators: dict[str, int]
    weights: dict[str, str]
    graph: str


@dataclass(frozen=True, slots=True)
class LockedPass:
    """What a pass did.

    Attributes:
        exact: Whether it keeps values.
        matches: Sites in the whole model.
        sites: Region -> sites of its graph; None where only the sum is known, as of an artifact.
        refusals: "region: reason" for sites that were left alone.
        misses: Region -> how what comes closest to a pattern differs from it, where nothing matched.
    """

    exact: bool
    matches: int
    sites: dict[str, int] | None
    refusals: tuple[str, ...]
    misses: dict[str, str]


@dataclass(frozen=True, slots=True)
class LockedKernel:
    """A Triton kernel in one configuration.

    Attributes:
        regions: That launch it.
        targets: Target ("sm_90") -> registers, spilled, shared, tensor_core, cubin; memory in bytes.
    """

    regions: tuple[str, ...]
    targets: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Kernels:
    """Triton kernels that the program launches on a GPU.

    Attributes:
        skipped: Why there is no table, or "".
        table: Kernel with its constants -> what became of it.
    """

    skipped: str = ""
    table: dict[str, LockedKernel] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lock:
    """See the fields' own types; `config` and `recipe` are enough to make the rest again."""

    source: str
    family: str
    recipe: Recipe
    versions: dict[str, str]
    interface: dict[str, dict[str, str]]
    dimensions: dict[str, str]
    prologue: dict[str, str]
    variants: dict[str, str]
    regions: dict[str, LockedRegion]
    passes: dict[str, LockedPass]
    kernels: Kernels
    config: dict[str, Any]

    def to_text(self) -> str:
        """The file's text."""
        values: dict[str, Any] = {
            "schema": SCHEMA,
            "source": self.source,
            "family": self.family,
            "recipe": _without_none(self.recipe.to_mapping()),
            **{name: getattr(self, name) for name in _TABLES},
            "passes": {name: _pass_values(entry) for name, entry in self.passes.items()},
            "regions": {name: _record(entry) for name, entry in self.regions.items()},
            "kernels": _kernel_values(self.kernels),
            "model": {"config": json.dumps(self.config, indent=1, sort_keys=True, ensure_ascii=False)},
        }
        return _HEAD + "\n" + to_toml(values)

    @classmethod
    def from_text(cls, text: str, where: str) -> Lock:
        """Read a lock's text.

        Raises:
            UsageError: It is no lock, or one of another schema.
        """
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{where} is not a lock: {error}. Make it again with vlmbuild lock.") from error
        if values.get("schema") != SCHEMA:
            raise UsageError(
                f"{where} has schema {values.get('schema')!r}, and this vlmbuild reads {SCHEMA!r}. Make it again with "
                "vlmbuild lock."
            )
        try:
            return cls(
                source=values["source"],
                family=values["family"],
                recipe=Recipe.from_mapping(_tuples(values["recipe"]), where),
                **{name: values.get(name, {}) for name in _TABLES},
                regions={name: _region(entry) for name, entry in values["regions"].items()},
                passes={name: _pass(entry) for name, entry in values["passes"].items()},
                kernels=_kernels(values.get("kernels", {})),
                config=json.loads(values["model"]["config"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{where} is not a whole lock: {error!r}. Make it again with vlmbuild lock.") from error


def read_lock(path: Path) -> Lock:
    """Read a lock file.

    Raises:
        UsageError: It cannot be read, or is no lock.
    """
    try:
        return Lock.from_text(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}. Give a file that vlmbuild lock has made.") from error


def _without_none(values: Any) -> Any:
    """TOML has no null; options that are None are left out."""
    if isinstance(values, Mapping):
        return {key: _without_none(value) for key, value in values.items() if value is not None}
    return [_row(item) for item in values] if isinstance(values, list) else values


def _row(item: Any) -> Any:
    return Row(_without_none(item)) if isinstance(item, Mapping) else item


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _record(entry: Any) -> dict[str, Any]:
    return {item.name: getattr(entry, item.name) for item in fields(entry)}


def _pass_values(entry: LockedPass) -> dict[str, Any]:
    values = _record(entry)
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if value is not None
    }


def _kernel_values(kernels: Kernels) -> dict[str, Any]:
    if kernels.skipped:
        return {"skipped": kernels.skipped}
    return {
        label: {"regions": list(kernel.regions), **{target: Row(row) for target, row in kernel.targets.items()}}
        for label, kernel in kernels.table.items()
    }


def _region(values: Mapping[str, Any]) -> LockedRegion:
    return LockedRegion(**{"operators": {}, "weights": {}, **values})


def _pass(values: Mapping[str, Any]) -> LockedPass:
    known = {"sites": {}, "misses": {}, **values}
    return LockedPass(**{**known, "refusals": tuple(known["refusals"])})


def _kernels(values: Mapping[str, Any]) -> Kernels:
    if "skipped" in values:
        return Kernels(values["skipped"])
    table = {
        label: LockedKernel(tuple(entry["regions"]), {key: dict(row) for key, row in entry.items() if key != "regions"})
        for label, entry in values.items()
    }
    return Kernels(table=table)

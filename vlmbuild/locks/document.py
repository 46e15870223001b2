"""The lock: a compiled program as one text file, identical on every machine.

It contains the values of config.json, so it is checked without the checkpoint or the hub. Entries of config.json that name a
machine or a tool are left out.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vlmbuild.artifact.output import output_errors
from vlmbuild.errors import UsageError
from vlmbuild.locks.toml_text import Row, to_toml
from vlmbuild.recipe import Recipe
from vlmbuild.util.renamed import PASSES, current_names

SCHEMA = "vlmbuild.lock/2"
_READABLE = ("vlmbuild.lock/1", SCHEMA)
SUFFIX = ".lock"
_HEAD = """\
# What vlmbuild compiles from a model and a recipe. Written by `vlmbuild lock`, compared with the code by `vlmbuild check`.
# FLOPs and bytes are those of one instance, as formulas of the dimensions; attention counts a packed row as one segment.
"""
TENSOR_CORES = ("none", "mma", "wgmma", "tcgen05")
"""Instructions for products of tiles, the slowest first."""

_KERNEL_ROW = {"tile": str, "registers": int, "spilled": int, "shared": int, "tensor_core": str, "cubin": int}
_TABLES = ("versions", "interface", "dimensions", "prologue", "variants")


@dataclass(frozen=True, slots=True)
class LockedRegion:
    """A region.

    Attributes:
        instances: Number of instances.
        flops, bytes: Cost of one instance, as formulas of the dimensions (`vlmbuild.ir.cost`).
        operators: Name -> number in the graph.
        weights: Source tensor -> format, for quantized tensors.
        graph: Listing (`vlmbuild.ir.printer.region_text`) in canonical order.
    """

    instances: int
    flops: str
    bytes: str
    operators: dict[str, int]
    weights: dict[str, str]
    graph: str


@dataclass(frozen=True, slots=True)
class LockedPass:
    """Effect of a pass.

    Attributes:
        exact: True if it preserves values.
        fuses: True if it replaces patterns by fused operators, so that fewer matches are a loss.
        matches: Sites in the whole model.
        sites: Region -> sites of its graph; None if only the sum is known, as for artifacts.
        refusals: "region: reason" for each unchanged site.
        misses: Region without matches -> difference between the pattern and its nearest candidate.
    """

    exact: bool
    fuses: bool
    matches: int
    sites: dict[str, int] | None
    refusals: tuple[str, ...]
    misses: dict[str, str]


@dataclass(frozen=True, slots=True)
class LockedKernel:
    """A Triton kernel in one configuration.

    Attributes:
        regions: Regions that launch it.
        targets: Target ("sm_90") -> tile, registers, spilled, shared, tensor_core, cubin; memory in bytes.
    """

    regions: tuple[str, ...]
    targets: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Kernels:
    """Triton kernels that the program launches on a GPU.

    Attributes:
        skipped: Reason why there is no table, or "".
        table: Kernel with its constants -> compiled kernel.
    """

    skipped: str = ""
    table: dict[str, LockedKernel] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock. `config` and `recipe` are enough to make the other fields again."""

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
        """Render the file."""
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
        """Parse the text of a lock.

        Raises:
            UsageError: The text is not a lock, or has another schema.
        """
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{where} is not a lock: {error}. Create it again with `vlmbuild lock`.") from error
        if values.get("schema") not in _READABLE:
            raise UsageError(
                f"{where} has schema {values.get('schema')!r}, but this version reads "
                f"{' and '.join(_READABLE)}. Create it again with `vlmbuild lock`."
            )
        try:
            return cls(
                source=_typed("source", values["source"], str),
                family=_typed("family", values["family"], str),
                recipe=Recipe.from_mapping(values["recipe"], where),
                **{name: _typed(name, values[name], dict) for name in _TABLES},
                regions={name: _region(name, entry) for name, entry in values["regions"].items()},
                passes={name: _pass(name, entry) for name, entry in current_names(values["passes"], PASSES).items()},
                kernels=_kernels(values["kernels"]),
                config=_typed("model.config", json.loads(values["model"]["config"]), dict),
            )
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
        except KeyError as error:
            raise UsageError(
                f"{where} is not a complete lock: {error} is missing. Create it again with `vlmbuild lock`."
            ) from error
        except (TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"{where} is not a complete lock: {error}. Create it again with `vlmbuild lock`."
            ) from error


def lock_files(paths: Iterable[str | Path]) -> list[Path]:
    """List lock files; folders are searched for *.lock.

    Raises:
        UsageError: A path does not exist, or a folder contains no lock.
    """
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        found = sorted(file for file in path.glob(f"*{SUFFIX}") if file.is_file()) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise UsageError(f"{path} holds no lock (*{SUFFIX}). Create one with `vlmbuild lock`.")
        files |= dict.fromkeys(found)
    return list(files)


def read_lock(path: Path) -> Lock:
    """Read a lock file.

    Raises:
        UsageError: The file cannot be read, or is not a lock.
    """
    try:
        return Lock.from_text(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}. Pass a file that `vlmbuild lock` wrote.") from error


def write_lock(path: Path, lock: Lock) -> None:
    """Write a lock file atomically.

    Raises:
        OutputError: The file cannot be written.
    """
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_text(lock.to_text(), encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def _without_none(values: Any) -> Any:
    """Drop None, which TOML cannot represent."""
    if isinstance(values, Mapping):
        return {key: _without_none(value) for key, value in values.items() if value is not None}
    return [_row(item) for item in values] if isinstance(values, list) else values


def _row(item: Any) -> Any:
    return Row(_without_none(item)) if isinstance(item, Mapping) else item


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


def _region(name: str, values: Mapping[str, Any]) -> LockedRegion:
    known = {"operators": {}, "weights": {}, **values}
    types = {"instances": int, "flops": str, "bytes": str, "operators": dict, "weights": dict, "graph": str}
    return LockedRegion(**_fields(f"regions.{name}", known, types))


def _pass(name: str, values: Mapping[str, Any]) -> LockedPass:
    known = {"sites": {}, "misses": {}, **values}
    types = {"exact": bool, "fuses": bool, "matches": int, "sites": dict, "refusals": list, "misses": dict}
    checked = _fields(f"passes.{name}", known, types)
    return LockedPass(**{**checked, "refusals": tuple(checked["refusals"])})


def _kernels(values: Mapping[str, Any]) -> Kernels:
    if "skipped" in values:
        return Kernels(_typed("kernels.skipped", values["skipped"], str))
    return Kernels(table={label: _kernel(f"kernels.{label}", entry) for label, entry in values.items()})


def _kernel(name: str, values: Mapping[str, Any]) -> LockedKernel:
    rows = {key: row for key, row in values.items() if key != "regions"}
    for target, row in rows.items():
        if _fields(f"{name}.{target}", row, _KERNEL_ROW)["tensor_core"] not in TENSOR_CORES:
            raise TypeError(f"{name}.{target}.tensor_core is {row['tensor_core']!r}")
    return LockedKernel(tuple(_typed(f"{name}.regions", values["regions"], list)), rows)


def _fields(name: str, values: Mapping[str, Any], types: Mapping[str, type]) -> dict[str, Any]:
    """Return the values after checking their names and types."""
    if unknown := sorted(values.keys() - types.keys()):
        raise TypeError(f"{name} has {', '.join(unknown)}, which no lock has")
    return {key: _typed(f"{name}.{key}", values[key], kind) for key, kind in types.items()}


def _typed(name: str, value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{name} is {value!r}, and not a {kind.__name__}")
    return value

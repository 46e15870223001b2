"""The lock: a compiled program as one text file, identical on every machine.

It contains the values of config.json, so it is checked without the checkpoint or the hub. Entries of config.json that name a
machine or a tool are left out.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args, get_type_hints

from vlmbuild.artifact.files import read_file
from vlmbuild.artifact.output import output_errors
from vlmbuild.errors import UsageError, reason
from vlmbuild.locks.toml_text import Row, to_toml
from vlmbuild.recipe import Recipe
from vlmbuild.util.records import read_as
from vlmbuild.util.renamed import PASSES, current_names

SCHEMA = "vlmbuild.lock/2"
_READABLE = ("vlmbuild.lock/1", SCHEMA)
SUFFIX = ".lock"
_MAX_BYTES = 16 * 2**20
"""Size limit of a lock, in bytes; the largest of ours has 50 kB."""
_HEAD = """\
# What vlmbuild compiles from a model and a recipe. Written by `vlmbuild lock`, compared with the code by `vlmbuild check`.
# FLOPs and bytes are those of one instance, as formulas of the dimensions; attention counts a packed row as one segment.
"""
TensorCore = Literal["none", "mma", "wgmma", "tcgen05"]
TENSOR_CORES: tuple[TensorCore, ...] = get_args(TensorCore)
"""Instructions for products of tiles, the slowest first."""

_TABLES = ("versions", "interface", "dimensions", "prologue", "variants")
_READ = ("source", "family", *_TABLES, "regions", "passes")
"""Fields that the file holds as they are."""


@dataclass(frozen=True, slots=True)
class LockedRegion:
    """A region.

    Attributes:
        instances: Number of instances.
        flops, bytes: Cost of one instance, as formulas of the dimensions (`vlmbuild.ir.cost`).
        graph: Listing (`vlmbuild.ir.printer.region_text`) in canonical order.
        operators: Name -> number in the graph.
        weights: Source tensor -> format, for quantized tensors.
    """

    instances: int
    flops: str
    bytes: str
    graph: str
    operators: dict[str, int] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LockedPass:
    """Effect of a pass.

    Attributes:
        exact: True if it preserves values.
        fuses: True if it replaces patterns by fused operators, so that fewer matches are a loss.
        matches: Sites in the whole model.
        refusals: "region: reason" for each unchanged site.
        sites: Region -> sites of its graph; None if only the sum is known, as for artifacts.
        misses: Region without matches -> difference between the pattern and its nearest candidate.
    """

    exact: bool
    fuses: bool
    matches: int
    refusals: tuple[str, ...]
    sites: dict[str, int] | None = field(default_factory=dict)
    misses: dict[str, str] = field(default_factory=dict)


class KernelRow(TypedDict):
    """Figures of a kernel on a target; memory in bytes."""

    tile: str
    registers: int
    spilled: int
    shared: int
    tensor_core: TensorCore
    cubin: int


@dataclass(frozen=True, slots=True)
class LockedKernel:
    """A Triton kernel in one configuration.

    Attributes:
        regions: Regions that launch it.
        targets: Target ("sm_90") -> figures.
    """

    regions: tuple[str, ...]
    targets: dict[str, KernelRow]


@dataclass(frozen=True, slots=True)
class Kernels:
    """Triton kernels that the program launches on a GPU.

    Attributes:
        skipped: Reason why there is no table, or "".
        table: Kernel with its constants -> compiled kernel.
    """

    skipped: str = ""
    table: dict[str, LockedKernel] = field(default_factory=dict)


NO_KERNELS = Kernels("not asked for")
"""The table of a lock that was made without kernels."""


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
            "recipe": self.recipe.to_mapping(),
            **{name: getattr(self, name) for name in _TABLES},
            "passes": {name: asdict(entry) for name, entry in self.passes.items()},
            "regions": {name: asdict(entry) for name, entry in self.regions.items()},
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
            if values.get("schema") not in _READABLE:
                raise UsageError(
                    f"it has schema {values.get('schema')!r}, but this version reads {' and '.join(_READABLE)}"
                )
            if missing := [name for name in (*_READ, "recipe", "kernels", "model") if name not in values]:
                raise UsageError(f"{', '.join(map(repr, missing))} is missing")
            values["passes"] = current_names(read_as(dict[str, Any], values["passes"], "passes"), PASSES)
            types, model = get_type_hints(cls), read_as(dict[str, str], values["model"], "model")
            return cls(
                recipe=Recipe.from_mapping(read_as(dict[str, Any], values["recipe"], "recipe"), where),
                kernels=_kernels(read_as(dict[str, Any], values["kernels"], "kernels")),
                config=read_as(dict[str, Any], json.loads(model.get("config", "null")), "model.config"),
                **{name: read_as(types[name], values[name], name) for name in _READ},
            )
        except (UsageError, ValueError, RecursionError) as error:
            reason = str(error).rstrip(".")
            raise UsageError(
                f"{where} cannot be read as a lock: {reason}. Create it again with `vlmbuild lock`."
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
        text = read_file(path, _MAX_BYTES).decode()
    except (OSError, ValueError) as error:  # also of bytes that are no text
        raise UsageError(f"{path} cannot be read: {reason(error)}. Pass a file that `vlmbuild lock` wrote.") from error
    return Lock.from_text(text, str(path))


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


def _kernel_values(kernels: Kernels) -> dict[str, Any]:
    if kernels.skipped:
        return {"skipped": kernels.skipped}
    return {
        label: {"regions": kernel.regions, **{target: Row(row) for target, row in kernel.targets.items()}}
        for label, kernel in kernels.table.items()
    }


def _kernels(values: dict[str, Any]) -> Kernels:
    if "skipped" in values:
        return Kernels(read_as(str, values["skipped"], "kernels.skipped"))
    table = {}
    for label, entry in values.items():
        where = f"kernels.{label}"
        targets = read_as(dict[str, Any], entry, where)
        regions = read_as(tuple[str, ...], targets.pop("regions", None), f"{where}.regions")
        table[label] = LockedKernel(regions, read_as(dict[str, KernelRow], targets, where))
    return Kernels(table=table)

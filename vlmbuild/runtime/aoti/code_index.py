"""The index of an artifact's compiled code: which file holds which region, for which platform, dtype and graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from vlmbuild.errors import UsageError
from vlmbuild.ir.program import Program, Region
from vlmbuild.runtime.aoti.platform import CodePlatform
from vlmbuild.util.records import read_as
from vlmbuild.util.renamed import CACHE_FORMS, current_names

CODE_INDEX = "code/index.json"


def compiled_regions(program: Program) -> dict[str, Region]:
    """Return the regions that are compiled: repeated blocks. Other regions are a few operators each, run once per batch, and
    would take as long to compile as a block."""
    return {name: region for name, region in program.regions.items() if len(region.instances) > 1}


@dataclass(frozen=True, slots=True)
class CodeFile:
    """A package with machine code.

    Attributes:
        file: Path in the artifact.
        inputs: Inputs of the code after the slots: indices of the region's activations, and their dtypes.
    """

    file: str
    inputs: tuple[tuple[int, str], ...]

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"file": self.file, "inputs": [list(entry) for entry in self.inputs]}

    def __post_init__(self) -> None:
        if not self.file.endswith(".pt2"):  # a manifest calls such files code, whoever wrote it
            raise UsageError(f"{self.file} is no package")
        if any(not isinstance(getattr(torch, dtype, None), torch.dtype) for _, dtype in self.inputs):
            raise UsageError(f"{self.file} reads inputs of an unknown dtype")


@dataclass(frozen=True, slots=True)
class CodeEntry:
    """One compiled region.

    Attributes:
        graph: SHA-256 (hex) of the compiled region's text.
        code: Code for any number of tokens.
        token: Code for a single token of a single row, if any.
        token_axis: Index and axis of an activation with a row for every token.
    """

    graph: str
    code: CodeFile
    token: CodeFile | None = None
    token_axis: tuple[int, int] | None = None

    @property
    def files(self) -> tuple[CodeFile, ...]:
        """All packages of the region."""
        return (self.code,) if self.token is None else (self.code, self.token)

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        record: dict[str, Any] = {"graph": self.graph, "code": self.code.record()}
        if self.token is not None and self.token_axis is not None:
            record |= {"token": self.token.record(), "token_axis": list(self.token_axis)}
        return record

    def fits(self, region: Region) -> bool:
        """Return whether the code takes each activation of the region once, and the axis of tokens exists."""
        shapes = region.activations
        takes_all = all(sorted(i for i, _ in file.inputs) == list(range(len(shapes))) for file in self.files)
        if not takes_all or self.token_axis is None:
            return takes_all
        index, axis = self.token_axis
        return 0 <= index < len(shapes) and 0 <= axis < len(shapes[index])


@dataclass(frozen=True, slots=True)
class CodeIndex:
    """All compiled regions.

    Attributes:
        platform: Platform that they need.
        dtype: The compute dtype.
        regions: Form of the cache -> region -> code.
    """

    platform: CodePlatform
    dtype: str
    regions: Mapping[str, Mapping[str, CodeEntry]]

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "platform": self.platform.record(),
            "dtype": self.dtype,
            "regions": {
                form: {name: entry.record() for name, entry in entries.items()}
                for form, entries in self.regions.items()
            },
        }

    @classmethod
    def from_record(cls, record: Any) -> Self:
        """Read JSON values. Raises UsageError for anything but an index."""
        index: Self = read_as(cls, record, CODE_INDEX)
        return replace(index, regions=current_names(index.regions, CACHE_FORMS))

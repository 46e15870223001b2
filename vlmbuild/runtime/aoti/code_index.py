"""The index of an artifact's compiled code: which file holds which region, for which platform, dtype and graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from vlmbuild.ir.program import Program, Region
from vlmbuild.runtime.aoti.platform import CodePlatform

CODE_INDEX = "code/index.json"


def compiled_regions(program: Program) -> dict[str, Region]:
    """Those that are compiled: the repeated blocks. The parts between them are a few operators each, which run once a batch
    and would take as long to compile as a block."""
    return {name: region for name, region in program.regions.items() if len(region.instances) > 1}


@dataclass(frozen=True, slots=True)
class CodeFile:
    """A package with machine code.

    Attributes:
        file: Path in the artifact.
        inputs: What the code takes after the slots: places among the region's activations, and the dtype of each.
    """

    file: str
    inputs: tuple[tuple[int, str], ...]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"file": self.file, "inputs": [list(entry) for entry in self.inputs]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Raises what `CodeIndex.from_record` raises."""
        file = str(record["file"])
        if not file.endswith(".pt2"):  # a manifest calls such files code, whoever wrote it
            raise ValueError(f"{file} is no package")
        return cls(file, tuple((int(place), str(dtype)) for place, dtype in record["inputs"]))


@dataclass(frozen=True, slots=True)
class CodeEntry:
    """One compiled region.

    Attributes:
        graph: SHA-256 (hex) of the region's text, which says what was compiled.
        code: For any number of tokens.
        token: For a single token of a single row, where there is such code.
        token_axis: Of an activation that has a row for every token, its place and the axis.
    """

    graph: str
    code: CodeFile
    token: CodeFile | None = None
    token_axis: tuple[int, int] | None = None

    @property
    def files(self) -> tuple[CodeFile, ...]:
        """All its code."""
        return (self.code,) if self.token is None else (self.code, self.token)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {"graph": self.graph, "code": self.code.record()}
        if self.token is not None and self.token_axis is not None:
            found |= {"token": self.token.record(), "token_axis": list(self.token_axis)}
        return found

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Raises what `CodeIndex.from_record` raises."""
        graph, code = str(record["graph"]), CodeFile.from_record(record["code"])
        if "token" not in record:
            return cls(graph, code)
        place, axis = record["token_axis"]
        return cls(graph, code, CodeFile.from_record(record["token"]), (int(place), int(axis)))


@dataclass(frozen=True, slots=True)
class CodeIndex:
    """All compiled regions.

    Attributes:
        platform: That they need.
        dtype: The compute dtype.
        regions: Form of the cache -> region -> code.
    """

    platform: CodePlatform
    dtype: str
    regions: Mapping[str, Mapping[str, CodeEntry]]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "platform": self.platform.record(),
            "dtype": self.dtype,
            "regions": {
                form: {name: entry.record() for name, entry in entries.items()}
                for form, entries in self.regions.items()
            },
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Raises LookupError, TypeError, ValueError or AttributeError for a record of something else."""
        regions = {
            form: {name: CodeEntry.from_record(entry) for name, entry in entries.items()}
            for form, entries in record["regions"].items()
        }
        return cls(CodePlatform.from_record(record["platform"]), str(record["dtype"]), regions)

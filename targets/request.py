"""Input of every target: the finished program, its checkpoint, and its recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmbuild.adapters.merge import Merge
from vlmbuild.artifact.files import read_file
from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.artifact.weights_writer import TensorSpec
from vlmbuild.checkpoint.checkpoint import Checkpoint, HashedFile, changed_file
from vlmbuild.checkpoint.tensors import SourceTensor
from vlmbuild.errors import SourceError
from vlmbuild.families import Family
from vlmbuild.formats import WeightFormat
from vlmbuild.golden.cases import GoldenCase
from vlmbuild.ir.program import Program
from vlmbuild.measure.merge_parity import MergeCheck
from vlmbuild.quant.decide import Decision
from vlmbuild.recipe import TARGET_OPTIONS, Recipe
from vlmbuild.rewrite.pass_manager import PassReport
from vlmbuild.util.progress import Progress


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """Parameter of the source as it is stored.

    Attributes:
        name: Module name.
        shape: Shape of the parameter.
        format: Storage format; None for plain.
        specs: Stored tensors, the weight first.
    """

    name: str
    shape: tuple[int, ...]
    format: WeightFormat | None
    specs: tuple[TensorSpec, ...]

    @property
    def module(self) -> str:
        """Name of its module in the artifact's files."""
        return self.specs[0].name.rpartition(".weight")[0]  # of "o_proj.weight_packed" too


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file of weights before it is written.

    Attributes:
        path: Path in the artifact.
        size: Size in bytes.
        parameters: Parameters in it.
    """

    path: str
    size: int
    parameters: tuple[StoredParameter, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A build whose graph is finished.

    Attributes:
        checkpoint: Source of weights and files.
        digests: Each source file by name, hashed in background threads.
        recipe: Options of the build.
        program: The program after its passes.
        reports: Reports of the passes.
        decisions: Storage of linear layers, by module name.
        calibration: SHA-256 (hex) of the batches that decisions were measured on, or "".
        device: Device that quantizes weights.
        merged: The adapter that is merged into the weights, with the check of the result; None for none.
        golden: Prompts to record, empty for the packaged ones; None for what the target records by itself.
        progress: Called with a stage's name, the amount done, and the total.
    """

    checkpoint: Checkpoint
    digests: Mapping[str, Future[HashedFile]]
    recipe: Recipe
    program: Program
    reports: tuple[PassReport, ...]
    decisions: Mapping[str, Decision]
    calibration: str
    device: str
    merged: MergeCheck | None
    golden: tuple[GoldenCase, ...] | None = None
    progress: Progress

    @property
    def family(self) -> Family:
        """The program's family."""
        return self.checkpoint.family

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the recipe."""
        dtype: torch.dtype = getattr(torch, self.recipe.dtype)
        return dtype

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Names of the dtypes that the target computes in."""
        return TARGET_OPTIONS[self.recipe.target].dtypes

    @property
    def weights(self) -> CheckpointWeights:
        """The source's files of weights."""
        return self.checkpoint.weights

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """The source's parameters by module name."""
        return self.checkpoint.tensors

    @property
    def merge(self) -> Merge | None:
        """The adapter to merge into the weights."""
        return None if self.merged is None else self.merged.merge

    def side_files(self) -> dict[str, bytes]:
        """Read processor files and defaults of generation as they were hashed, completed for the stock processor.

        Raises:
            SourceError: A file cannot be read, or has changed.
        """
        files = {}
        for file in self.checkpoint.side_files:
            hashed = self.digests[file.name].result()
            try:
                files[file.name] = read_file(file, hashed.size)
            except ValueError as error:  # longer
                raise changed_file(file) from error
            except OSError as error:
                raise SourceError(f"{file} cannot be read: {error.strerror}. Leave the source alone.") from error
            if hashlib.sha256(files[file.name]).hexdigest() != hashed.digest:
                raise changed_file(file)
        return files | self.family.stock_files(files)

    def measure(self, directory: Path) -> Sequence[Mapping[str, Any]]:
        """Return the manifest's records about merged weights that are complete in a directory. Raises ParityError."""
        return () if self.merged is None else self.merged.measure(directory, self.recipe, self.decisions, self.progress)

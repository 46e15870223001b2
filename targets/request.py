"""What every target is given: the finished program, and where its weights and files come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmbuild.adapters.merge import Merge
from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.artifact.weights_writer import TensorSpec
from vlmbuild.checkpoint.source import Progress, Source
from vlmbuild.checkpoint.tensors import SourceTensor
from vlmbuild.families import Family
from vlmbuild.formats import WeightFormat
from vlmbuild.ir.program import Program
from vlmbuild.quant.decide import Decision
from vlmbuild.recipe import Recipe
from vlmbuild.rewrite.pass_manager import PassReport


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """What becomes of a parameter of the source.

    Attributes:
        name: Module name.
        shape: Of the parameter.
        format: In which it is stored; None for plain.
        specs: Of the tensors that are stored, the weight first.
    """

    name: str
    shape: tuple[int, ...]
    format: WeightFormat | None
    specs: tuple[TensorSpec, ...]

    @property
    def module(self) -> str:
        """Name of its module in the artifact's files."""
        return self.specs[0].name.removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class Request:
    """A build whose graph is finished.

    Attributes:
        program: After its passes.
        reports: Of the passes.
        family: The program's family.
        config: Values of the source's config.json.
        recipe: What was asked for.
        source: Where files come from.
        digests: SHA-256 (hex) of each file of the source that is read, by name; being computed meanwhile.
        weights: The source's files of weights.
        tensors: The source's parameters by module name.
        decisions: How linear layers are stored, by module name.
        calibration: SHA-256 (hex) of the batches that decisions were measured on, or "".
        device: Where weights are quantized.
        merge: The adapter to merge into the weights, None for none.
        measure: Given the directory of the complete weights, the manifest's `numerics`; raises when they are wrong.
        progress: Told how far writing has come.
    """

    program: Program
    reports: tuple[PassReport, ...]
    family: Family
    config: dict[str, Any]
    recipe: Recipe
    source: Source
    digests: Mapping[str, Future[str]]
    weights: CheckpointWeights
    tensors: Mapping[str, SourceTensor]
    decisions: Mapping[str, Decision]
    calibration: str
    device: str
    merge: Merge | None
    measure: Callable[[Path], Sequence[Mapping[str, Any]]]
    progress: Progress

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored unquantized weights and of the computation."""
        dtype: torch.dtype = getattr(torch, self.recipe.dtype)
        return dtype

"""A source checkpoint as the builder sees it: its config, its family, its tensors with their formats, and its files."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.checkpoint.digests import hashing
from vlmbuild.checkpoint.source import SIDE_FILES, Source, resolve
from vlmbuild.checkpoint.tensors import SourceTensor, announced_formats, source_tensors, stored_formats
from vlmbuild.families import Family, family_of
from vlmbuild.formats import WeightFormat
from vlmbuild.ir.program import Program
from vlmbuild.quant.bnb_config import check_method
from vlmbuild.util.progress import Progress


class Checkpoint:
    """A source checkpoint. Each part is read when it is first needed, and once; weights may be absent until then.

    Properties raise SourceError for files that are missing, malformed, or not of a supported model.

    Attributes:
        source: Directory and name of the source.
    """

    def __init__(self, source: Source, values: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            source: Directory and name.
            values: Values of config.json, for a checkpoint without files.
        """
        self.source = source
        self._values = None if values is None else dict(values)

    @classmethod
    def open(
        cls,
        source: str | Path | Source,
        *,
        revision: str | None = None,
        weights: bool = True,
        progress: Progress | None = None,
    ) -> Self:
        """Find a checkpoint, and check that its config is of a supported model. Options and errors are those of `resolve`."""
        checkpoint = cls(resolve(source, revision=revision, weights=weights, progress=progress))
        _ = checkpoint.config
        return checkpoint

    @classmethod
    def of_config(cls, values: Mapping[str, Any], uri: str) -> Self:
        """Make a checkpoint that has nothing but the values of its config.json."""
        return cls(Source(Path(uri), uri), values)

    @cached_property
    def values(self) -> dict[str, Any]:
        """The values of config.json."""
        return self.source.config() if self._values is None else self._values

    @cached_property
    def family(self) -> Family:
        """The family that reads the config."""
        return family_of(self.values, self._where if self._values is not None else f"{self._where}/config.json")

    @cached_property
    def config(self) -> Any:
        """The transformers config; a quantization that is not known is refused."""
        family = self.family
        if self.values.get("quantization_config") is not None:
            check_method(self.values["quantization_config"], self._where)
        return family.config(self.values)

    @cached_property
    def weights(self) -> CheckpointWeights:
        """The files of weights, by their headers."""
        return CheckpointWeights(self.source.directory)

    @cached_property
    def tensors(self) -> dict[str, SourceTensor]:
        """Every parameter by module name, plain or quantized."""
        return source_tensors(self.weights, self.family, self.values)

    @cached_property
    def processor(self) -> Any:
        """The processor."""
        return self.family.processor(self.source.directory)

    @property
    def side_files(self) -> list[Path]:
        """Processor files and defaults of generation, which artifacts take over."""
        return self.source.files(SIDE_FILES)

    def formats(self, program: Program) -> Mapping[str, WeightFormat]:
        """Return the formats of quantized layers by module: of the weights if they are here, else as the config announces."""
        if self.values.get("quantization_config") is None or self._has_weights:
            return stored_formats(self.tensors) if self._has_weights else {}
        return announced_formats(self.family, self.values, program, self._where)

    def published(self, module: str) -> str:
        """Return the name that a module has in published checkpoints."""
        return self.family.stored_name(f"{module}.weight").removesuffix(".weight")

    def hashing(self) -> AbstractContextManager[Mapping[str, Future[str]]]:
        """Hash the files of a build in background threads: config, side files and weights."""
        config = self.source.files(("config.json",))
        return hashing(self.source.directory, [*config, *self.side_files, *self.weights.files])

    @property
    def _where(self) -> str:
        return self.source.uri if self._values is not None else str(self.source.directory)

    @property
    def _has_weights(self) -> bool:
        return self._values is None and any(self.source.directory.glob("*.safetensors"))

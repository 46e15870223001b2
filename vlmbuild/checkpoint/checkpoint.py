"""A source checkpoint as the builder sees it: its config, its family, its tensors with their formats, and its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from vlmbuild.artifact.files import hash_file
from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.checkpoint.source import SIDE_FILES, Source, resolve
from vlmbuild.checkpoint.tensors import SourceTensor, source_tensors
from vlmbuild.errors import SourceError
from vlmbuild.families import Family, family_of
from vlmbuild.formats import WeightFormat
from vlmbuild.ir.linear_layers import linear_layers
from vlmbuild.ir.program import Program
from vlmbuild.quant.bnb_config import MIXED, announced_format, check_method, is_skipped
from vlmbuild.util.cpu import available_cores
from vlmbuild.util.pool import cancellable_pool
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
        """Return the formats of quantized layers by module: of the weights if they are here, else as the config announces.

        Raises:
            SourceError: There are no weights, and the config cannot tell their formats apart.
        """
        if self._values is None and any(self.source.directory.glob("*.safetensors")):
            formats = {name.removesuffix(".weight"): tensor.format for name, tensor in self.tensors.items()}
            return {module: form for module, form in formats.items() if form is not None}
        config = self.values.get("quantization_config")
        if config is None:
            return {}
        if config.get("quant_method") == MIXED:
            raise SourceError(
                f"{self._where} has 4-bit and 8-bit weights, and only they can tell which is which. Put them beside "
                "config.json."
            )
        skipped = config.get("llm_int8_skip_modules") or ["lm_head"]
        modules = [layer.module for layer in linear_layers(program) if not layer.shared]
        names = {module: (module, self.published(module)) for module in modules}
        form = announced_format(config)
        return {module: form for module in modules if not any(is_skipped(name, skipped) for name in names[module])}

    def published(self, module: str) -> str:
        """Return the name that a module has in published checkpoints."""
        return self.family.stored_name(f"{module}.weight").removesuffix(".weight")

    @contextmanager
    def hashing(self) -> Iterator[Mapping[str, Future[str]]]:
        """Hash config, side files and weights in background threads; leaving the block cancels them.

        Yields the SHA-256 (hex) of each file by its path in the directory; `result()` raises SourceError for one that
        cannot be read.
        """
        directory = self.source.directory
        with cancellable_pool(available_cores()) as (pool, check):

            def digest(file: Path) -> str:
                try:
                    return hash_file(file, on_chunk=lambda _: check())
                except OSError as error:
                    raise SourceError(
                        f"{file} cannot be read: {error.strerror}. Check the disk and permissions."
                    ) from error

            files = [*self.source.files(("config.json",)), *self.side_files, *self.weights.files]
            yield {file.relative_to(directory).as_posix(): pool.submit(digest, file) for file in files}

    @property
    def _where(self) -> str:
        return self.source.uri if self._values is not None else str(self.source.directory)

"""A source checkpoint as the builder sees it: its config, its family, its tensors with their formats, and its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from vlmbuild.adapters.identity import Base, source_digests
from vlmbuild.artifact.comparison import is_artifact
from vlmbuild.artifact.files import Identity, closing, hash_descriptor, open_file
from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.paths import GENERATION_CONFIG
from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.checkpoint.layout import check_no_prefix, check_strays, check_weight_files
from vlmbuild.checkpoint.source import PROCESSOR_FILES, Source, read_json_object, resolve
from vlmbuild.checkpoint.tensors import SourceTensor, same_values, source_tensors
from vlmbuild.errors import SourceError, VlmbuildError
from vlmbuild.families import FAMILIES, Family, family_of
from vlmbuild.families.chat import question_text
from vlmbuild.formats import WeightFormat
from vlmbuild.ir.linear_layers import linear_layers
from vlmbuild.ir.program import Program
from vlmbuild.quant.bnb_config import MIXED, announced_format, check_method, is_skipped
from vlmbuild.quant.dequantized import is_dequantized
from vlmbuild.util.cpu import available_cores
from vlmbuild.util.pool import cancellable_pool
from vlmbuild.util.progress import Progress


class HashedFile(NamedTuple):
    """Size and SHA-256 (hex) of a file of a source."""

    size: int
    digest: str


class Checkpoint:
    """A source checkpoint. Each part is read when it is first needed, and once; weights may be absent until then.

    Properties raise SourceError for files that are missing, malformed, or not of a supported model.

    Attributes:
        source: Directory and name of the source.
        processor_source: Those of the processor's files.
    """

    def __init__(
        self,
        source: Source,
        values: Mapping[str, Any] | None = None,
        *,
        processor: Source | None = None,
        strip_prefix: str = "",
    ) -> None:
        """
        Args:
            source: Directory and name.
            values: Values of config.json, for a checkpoint without files.
            processor: Where the processor's files are; None for the source itself.
            strip_prefix: Leading part of every tensor's name in the files, which the model's names do not have.
        """
        self.source = source
        self.processor_source = processor or source
        self._given = None if values is None else dict(values)
        self._prefix = strip_prefix
        self._identities: dict[Path, Identity] = {}

    @classmethod
    def open(
        cls,
        source: str | Path | Source,
        *,
        revision: str | None = None,
        weights: bool = True,
        processor: str | Path | None = None,
        strip_prefix: str = "",
        progress: Progress | None = None,
    ) -> Self:
        """Find a checkpoint, and check that its config is of a supported model.

        Options and errors are those of `resolve` and of the constructor; `processor` is a source too.
        """
        found = resolve(source, revision=revision, weights=weights, progress=progress)
        other = None if processor is None else resolve(processor, weights=False, progress=progress)
        checkpoint = cls(found, processor=other, strip_prefix=strip_prefix)
        side = [*checkpoint.processor_source.files(PROCESSOR_FILES), *found.files((GENERATION_CONFIG,))]
        checkpoint._identities = {file: Identity.of(file.stat()) for file in [*found.files(("config.json",)), *side]}
        _ = checkpoint.config
        return checkpoint

    @classmethod
    def of_config(cls, values: Mapping[str, Any], uri: str) -> Self:
        """Make a checkpoint that has nothing but the values of its config.json."""
        return cls(Source(Path(uri), uri), values)

    @cached_property
    def values(self) -> dict[str, Any]:
        """The values of config.json.

        Parameters that they tie, but that are stored with different values, are not tied, as in transformers.
        """
        if not self._has_weights or not self._ties_differ():
            return self._raw_values
        text = self._raw_values.get("text_config")
        nested = {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, Mapping) else {}
        return {**self._raw_values, **nested, "tie_word_embeddings": False}

    def _ties_differ(self) -> bool:
        ties = self._raw_ties()
        stored = {self.family.module_name(name) for name in self.weights.tensors}
        return any(
            not same_values(self.weights, self.tensors[alias], self.tensors[owner])
            for alias, owner in ties.items()
            if {alias, owner} <= stored
        )

    def _raw_ties(self) -> dict[str, str]:
        return self.family.ties(self.family.config(self._raw_values))

    @cached_property
    def _raw_values(self) -> dict[str, Any]:
        return self.source.config() if self._given is None else self._given

    @cached_property
    def family(self) -> Family:
        """The family that reads the config."""
        return family_of(self._raw_values, self._where if self._given is not None else f"{self._where}/config.json")

    @cached_property
    def config(self) -> Any:
        """The transformers config; a quantization that is not known is refused."""
        family = self.family
        if self._raw_values.get("quantization_config") is not None:
            check_method(self._raw_values["quantization_config"], self._where)
        return family.config(self.values)

    @cached_property
    def manifest(self) -> Manifest | None:
        """Manifest of a source that is an artifact; None for other sources."""
        directory = self.source.directory
        if self._given is not None or not is_artifact(directory):
            return None
        return ArtifactReader(directory, verify=False).manifest

    @property
    def artifact_dtype(self) -> str | None:
        """Compute dtype of a source that is an artifact; None for other sources."""
        return None if self.manifest is None else str(self.manifest.recipe.get("dtype"))

    @cached_property
    def weights(self) -> CheckpointWeights:
        """The files of weights, by their headers."""
        directory = self.source.directory
        check_weight_files(directory)
        weights = CheckpointWeights(directory, strip_prefix=self._prefix)
        check_strays(directory, weights.files)
        return weights

    @cached_property
    def tensors(self) -> dict[str, SourceTensor]:
        """Every parameter by module name, plain or quantized."""
        embeddings = f"{self.family.language_prefix}embed_tokens.weight"
        check_no_prefix(self.source.directory, self.weights.tensors, self.family.module_name, embeddings)
        tensors = source_tensors(self.weights, self.family, self._raw_values)
        for alias, owner in self._raw_ties().items():
            if alias in tensors and owner not in tensors:  # either name may stand for both
                tensors[owner] = tensors.pop(alias)
        return tensors

    @cached_property
    def processor(self) -> Any:
        """The processor; another family's is refused, and one whose chat template writes no prompt."""
        for file in self.processor_source.files(("processor_config.json", "preprocessor_config.json")):
            name = read_json_object(file, "Restore it.").get("processor_class")
            for other in FAMILIES.values():
                if name in other.processors and name not in self.family.processors:
                    raise SourceError(
                        f"{file} is of {other.title}, and the model is of {self.family.title}. Pass the model's own processor "
                        "with --processor."
                    )
        directory = self.processor_source.directory
        try:
            processor = self.family.processor(directory)
        except SourceError as error:
            raise SourceError(
                f"{error} If they are elsewhere, pass --processor with that directory or hub id."
            ) from error
        for images in (0, 1):  # a template may ask for an image
            try:
                question_text(processor, "Hello", images)
                return processor
            except VlmbuildError as error:
                refused = error
        raise SourceError(f"{directory}: no prompt can be written. {refused}")

    @property
    def side_files(self) -> list[Path]:
        """Processor files and defaults of generation, which artifacts take over."""
        return [file for file in self._identities if file.name != "config.json"]

    def formats(self, program: Program) -> Mapping[str, WeightFormat]:
        """Return the formats of quantized layers by module: of the weights if they are here, else as the config announces.

        Raises:
            SourceError: There are no weights, and the config cannot tell their formats apart.
        """
        config = self._raw_values.get("quantization_config")
        if config is None or is_dequantized(config):  # these are dequantized when they are read
            return {}
        if self._has_weights:
            formats = {name.removesuffix(".weight"): tensor.format for name, tensor in self.tensors.items()}
            return {module: form for module, form in formats.items() if form is not None}
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
    def hashing(self) -> Iterator[Mapping[str, Future[HashedFile]]]:
        """Hash config, side files and weights in background threads; leaving the block cancels them.

        Yields each file by its path in the directory; `result()` raises SourceError for one that cannot be read, or is not
        the one that was there when the checkpoint was opened.
        """
        with cancellable_pool(available_cores()) as (pool, check):
            files = {file.name: file for file in self._identities}
            files |= {file.relative_to(self.source.directory).as_posix(): file for file in self.weights.files}
            yield {name: pool.submit(self._hashed, file, check) for name, file in files.items()}

    def _hashed(self, file: Path, check: Callable[[], None]) -> HashedFile:
        identities = {**self._identities, **self.weights.identities}
        try:
            with closing(open_file(file)) as descriptor:
                hashed = HashedFile(*hash_descriptor(descriptor, on_chunk=lambda _: check()))
                changed = Identity.of(os.fstat(descriptor)) != identities[file]
        except OSError as error:
            raise SourceError(f"{file} cannot be read: {error.strerror}. Check the disk and permissions.") from error
        if changed:
            raise changed_file(file)
        return hashed

    def records(self, digests: Mapping[str, Future[HashedFile]]) -> list[Mapping[str, Any]]:
        """Return the manifest's records of the files; waits for their digests."""
        files = {name: digest.result() for name, digest in sorted(digests.items())}
        entries = [{"path": name, "size": file.size, "digest": file.digest} for name, file in files.items()]
        layouts = {tensor.dequantized.layout for tensor in self.tensors.values() if tensor.dequantized is not None}
        source = {"uri": self.source.uri}
        if layouts:
            method = self._raw_values["quantization_config"]["quant_method"]
            source["dequantized"] = f"{method}: {'; '.join(sorted(layouts))}"
        if self.processor_source == self.source:
            return [{**source, "files": entries}]
        theirs = [entry for entry in entries if entry["path"] in PROCESSOR_FILES]
        return [
            {**source, "files": [entry for entry in entries if entry not in theirs]},
            {"uri": self.processor_source.uri, "files": theirs},
        ]

    def base(self, digests: Mapping[str, Future[HashedFile]]) -> Base:
        """Return its identity as the base of an adapter. Waits for digests of weights, unless it is an artifact."""
        if self.manifest is None:
            weights, processor = source_digests(self.records(digests))
            return Base("", (weights,), (processor,))
        base = Base.of_manifest(self.manifest)
        if self.processor_source == self.source:
            return base
        files = [{"path": file.name, "digest": digests[file.name].result().digest} for file in self.side_files]
        return replace(base, processors=(source_digests([{"files": files}])[1],))

    @property
    def _where(self) -> str:
        return self.source.uri if self._given is not None else str(self.source.directory)

    @property
    def _has_weights(self) -> bool:
        return self._given is None and any(self.source.directory.glob("*.safetensors"))


def changed_file(file: Path) -> SourceError:
    """Return the error of a source's file that is not what it was when the build began."""
    return SourceError(f"{file} changed while it was built. Leave the source alone and try again.")

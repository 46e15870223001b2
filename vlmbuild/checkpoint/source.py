"""Where a checkpoint comes from: a directory, the name of a zoo checkpoint, or a hub id. Nothing in it is ever executed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmbuild.artifact.files import closing, open_file, read_file
from vlmbuild.artifact.hub import HUB_ID, check_no_revision, download, split_revision
from vlmbuild.artifact.paths import GENERATION_CONFIG, MANIFEST_NAME
from vlmbuild.checkpoint.layout import check_no_adapter
from vlmbuild.errors import SourceError
from vlmbuild.util.progress import Progress, silent
from vlmbuild.util.validation import reachable
from vlmbuild.zoo import ZOO

PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Files of a processor in published checkpoints."""

MAX_JSON_BYTES = 64 * 2**20
"""Size limit of a config, in bytes; the largest published one has 70 kB."""
_MAX_SIDE_BYTES = 2**28
"""Size limit of a processor file, in bytes: transformers reads it whole. The largest published tokenizer has 35 MB."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint on this machine.

    Attributes:
        directory: Where its files are.
        uri: How the manifest names it; says nothing about this machine.
    """

    directory: Path
    uri: str

    def config(self) -> dict[str, Any]:
        """Read the values of config.json.

        Raises:
            SourceError: It is missing or is not a JSON object, or an adapter's files lie there.
        """
        check_no_adapter(self.directory)
        return read_json_object(self.directory / "config.json", "Pass the directory of a Hugging Face checkpoint.")

    def files(self, names: tuple[str, ...]) -> list[Path]:
        """Return the named files that exist."""
        return [self.directory / name for name in names if (self.directory / name).is_file()]


def resolve(
    source: str | Path | Source,
    *,
    revision: str | None = None,
    weights: bool = True,
    progress: Progress | None = None,
) -> Source:
    """Find a checkpoint, downloading it from the hub when it is a hub id.

    Args:
        source: A directory, the name of a zoo checkpoint, or a hub id ("owner/name" or "owner/name@revision"); a `Source`
            is returned as it is.
        revision: Branch, tag or commit of a hub id without its own.
        weights: False downloads the config and the processor only.
        progress: Called when a download begins and ends.

    Raises:
        UsageError: A revision is given for something that has none.
        SourceError: It is none of these, or the hub cannot be reached and the local cache does not hold it.
    """
    if isinstance(source, Source):
        return source
    path = reachable(source, SourceError, "The source")
    if path.exists() or str(source) in ZOO:
        check_no_revision(source, revision)
    if path.is_dir():
        _check_side_files(path)
        return Source(path, "directory")
    if path.exists():
        raise SourceError(f"{source} is a file. Name the directory that holds config.json and *.safetensors.")
    if str(source) in ZOO:
        return Source(ZOO[str(source)], f"zoo:{source}")
    if HUB_ID.fullmatch(str(source)):
        progress = progress or silent
        progress("download", 0, 1)
        found = _download(str(source), revision, weights)
        progress("download", 1, 1)
        return found
    raise SourceError(
        f"{source} is not a directory, a hub id (owner/name), or a zoo checkpoint ({', '.join(ZOO)}). Check the spelling."
    )


def _check_side_files(directory: Path) -> None:
    """Raise SourceError for a file that a library would wait for, or fill the memory with."""
    for name in (*PROCESSOR_FILES, GENERATION_CONFIG):
        with suppress(FileNotFoundError), closing(_open(directory / name)) as descriptor:
            if (size := os.fstat(descriptor).st_size) > _MAX_SIDE_BYTES:
                raise SourceError(
                    f"{directory / name} has {size} bytes; the limit is {_MAX_SIDE_BYTES}. Download the checkpoint again."
                )


def _open(file: Path) -> int:
    try:
        return open_file(file)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}. Download the checkpoint again.") from error


def read_json_object(path: Path, hint: str) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        SourceError: The file cannot be read as such; the message ends with the hint.
    """
    try:
        values = json.loads(read_file(path, MAX_JSON_BYTES))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}. {hint}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}. {hint}") from error
    if not isinstance(values, Mapping):
        raise SourceError(f"{path} holds {type(values).__name__}, not a JSON object. {hint}")
    return dict(values)


def _download(name: str, revision: str | None, weights: bool) -> Source:
    wanted = ["config.json", "adapter_config.json", *PROCESSOR_FILES, GENERATION_CONFIG, MANIFEST_NAME]
    wanted += ["*.safetensors", "*.safetensors.index.json"] if weights else []
    directory = download(name, revision, wanted)
    _check_side_files(directory)
    return Source(directory, f"{split_revision(name)[0]}@{directory.name}")

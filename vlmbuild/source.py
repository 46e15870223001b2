"""Where a checkpoint comes from: a directory, the name of a zoo checkpoint, or a hub id. Nothing in it is ever executed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmbuild.errors import SourceError
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
"""What a processor may be made of, as published checkpoints have it."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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
        """The values of config.json.

        Raises:
            SourceError: It is missing or is not a JSON object.
        """
        return read_json_object(self.directory / "config.json", "Is this the directory of a Hugging Face checkpoint?")

    def files(self, names: tuple[str, ...]) -> list[Path]:
        """Those of the named files that exist."""
        return [self.directory / name for name in names if (self.directory / name).is_file()]


def resolve(source: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Source:
    """Find a checkpoint, downloading it from the hub when it is a hub id.

    Args:
        source: A directory, the name of a zoo checkpoint, or a hub id ("owner/name").
        revision: Branch, tag or commit of a hub id.
        cache_dir: Where huggingface_hub keeps downloads; None for its default.

    Raises:
        SourceError: It is none of these, or the hub cannot be reached and the local cache does not hold it.
    """
    path = Path(source)
    if path.is_dir():
        return Source(path, "directory")
    if path.exists():
        raise SourceError(f"{source} is a file. Name the directory that holds config.json and *.safetensors.")
    if str(source) in ZOO:
        return Source(ZOO[str(source)], f"zoo:{source}")
    if _HUB_ID.fullmatch(str(source)):
        return _download(str(source), revision, cache_dir)
    raise SourceError(
        f"{source} is not a directory, a hub id (owner/name), or a zoo checkpoint ({', '.join(ZOO)}). Check the spelling."
    )


def read_json_object(path: Path, hint: str) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        SourceError: With the hint.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}. {hint}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}. {hint}") from error
    if not isinstance(values, Mapping):
        raise SourceError(f"{path} holds {type(values).__name__}, not a JSON object. {hint}")
    return dict(values)


def _download(name: str, revision: str | None, cache_dir: str | Path | None) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", *PROCESSOR_FILES]
    try:
        directory = snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=wanted)
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"{name} is neither a directory here nor in the local cache, and the hub cannot be reached. Check the "
            "network (or HF_HUB_OFFLINE), or download the checkpoint elsewhere and give its directory."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise SourceError(
            f"{name}{f' at revision {revision}' if revision else ''} cannot be downloaded: {error}. Check the name and "
            "the revision; for a gated model, log in with `hf auth login`."
        ) from error
    return Source(Path(directory), f"{name}@{Path(directory).name}")

"""The base that an adapter was trained on: its weights and its processor, by digests, in a file beside PEFT's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from vlmbuild.artifact.canonical import canonical_json
from vlmbuild.artifact.files import hash_file, read_file
from vlmbuild.artifact.manifest import ADAPTER_URI, Manifest
from vlmbuild.artifact.paths import GENERATION_CONFIG
from vlmbuild.errors import SourceError, UsageError, reason
from vlmbuild.util.records import read_as

BASE_FILE: Final = "vlmbuild_base.json"
"""A file of its own: PEFT warns of unknown keys in its config, and safetensors writes several keys in random order."""
_MAX_BYTES = 2**20
_WEIGHTS = ".safetensors"

Records = Sequence[Mapping[str, Any]]
"""`source` of a manifest: files of a checkpoint, of its processor, and of a merged adapter."""


@dataclass(frozen=True, slots=True)
class Base:
    """A model that adapters are trained on and loaded on.

    An artifact has two digests of its weights, its own and the source's: one built from the same source in another format
    is the same base, and so are the source itself and what is built from the artifact. Configs do not count.

    Attributes:
        artifact: Id of the artifact; empty for other checkpoints.
        weights: Digests of its weights.
        processors: Digests of its processor's files, as they are here and in the source.
    """

    artifact: str
    weights: tuple[str, ...]
    processors: tuple[str, ...]

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Self:
        """Return an artifact's identity."""
        files = [{"path": entry.path, "digest": entry.digest} for entry in manifest.files]
        own = _digest(files, weights=True), _digest(files, weights=False)
        source = source_digests(manifest.source)
        return cls(manifest.id, (own[0], source[0]), (own[1], source[1]))

    @property
    def name(self) -> str:
        """The id of the artifact, or else the digest of the weights."""
        return self.artifact or f"weights {self.weights[0]}"


def source_digests(records: Records) -> tuple[str, str]:
    """Return the digests of a source's weights, merged adapters included, and of its processor's files."""
    files = [file for record in records if record.get("uri") != ADAPTER_URI for file in record.get("files", ())]
    merged = [file for record in records if record.get("uri") == ADAPTER_URI for file in record.get("files", ())]
    return _digest(files, weights=True, merged=merged), _digest(files, weights=False)


def _digest(files: Iterable[Mapping[str, Any]], *, weights: bool, merged: Sequence[Mapping[str, Any]] = ()) -> str:
    """Hash names and digests of the files of weights, or of a processor."""
    chosen = [
        file for file in files if (file["path"].endswith(_WEIGHTS) if weights else _is_of_processor(file["path"]))
    ]
    pairs = [[[file["path"], file["digest"]] for file in part] for part in (chosen, merged)]
    return "sha256:" + hashlib.sha256(canonical_json([sorted(part) for part in pairs])).hexdigest()


def _is_of_processor(path: str) -> bool:
    others = ("config.json", GENERATION_CONFIG)
    return not ("/" in path or path.endswith((_WEIGHTS, f"{_WEIGHTS}.index.json")) or path in others)


def write_base(directory: Path, base: Base | None, adapter_file: str) -> None:
    """Write what an adapter in a directory was trained on; for None, remove what an earlier one was.

    Raises OSError.
    """
    file = directory / BASE_FILE
    if base is None:
        file.unlink(missing_ok=True)
        return
    values = {
        "artifact": base.artifact,
        "weights": list(base.weights),
        "processors": list(base.processors),
        "adapter": hash_file(directory / adapter_file),
    }
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_base(directory: Path, adapter_file: str) -> Base | None:
    """Read what the adapter in a directory was trained on.

    Returns:
        None if nothing says so: PEFT wrote the adapter, perhaps over one of ours.

    Raises:
        SourceError: The file is malformed.
    """
    try:
        values = json.loads(read_file(directory / BASE_FILE, _MAX_BYTES))
        if hash_file(directory / adapter_file) != values["adapter"]:
            return None
        names = (read_as(tuple[str, ...], values[key], key) for key in ("weights", "processors"))
        return Base(read_as(str, values["artifact"], "artifact"), *names)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError, UsageError) as error:
        raise SourceError(
            f"{directory / BASE_FILE} cannot be read: {reason(error)}. Save the adapter again, or remove the file to load "
            "the adapter without knowing its base."
        ) from error


def check_base(directory: str | Path, trained: Base | None, base: Base | None) -> None:
    """Compare what an adapter was trained on with what it is loaded on; one that is unknown fits.

    Raises:
        SourceError: They have other weights or another processor.
    """
    if trained is None or base is None:
        return
    remedy = "Use that base, or pass allow_other_base=True (to `build`: --allow-other-base)."
    if not set(trained.weights) & set(base.weights):
        raise SourceError(
            f"{directory} was trained on {trained.name}, and this is {base.name}: neither has the other's weights, nor do "
            f"both come from one source. {remedy}"
        )
    if not set(trained.processors) & set(base.processors):
        raise SourceError(
            f"{directory} was trained on {trained.name} with the processor {trained.processors[0]}, and {base.name} has the "
            f"processor {base.processors[0]}: prompts or images differ. {remedy}"
        )

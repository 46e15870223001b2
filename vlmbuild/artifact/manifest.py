"""The manifest: an artifact's contents, origin and identity."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from vlmbuild.artifact.canonical import canonical_json, parse_canonical, plain_json
from vlmbuild.artifact.paths import MANIFEST_NAME, check_collisions, check_path
from vlmbuild.errors import IncompatibleError, IntegrityError

SCHEMA: Final = "vlmbuild.artifact/2"
READABLE: Final = ("vlmbuild.artifact/1", SCHEMA)
"""Schema 1 has other names of passes (`util.renamed`)."""
ROLES: Final = ("code", "config", "data", "graph", "processor", "weights")

ADAPTER_URI: Final = "adapter"
"""URI of a merged adapter in `source`, without its path on the machine that built."""

MAX_FILES: Final = 100_000

# Loading one of these can run code, whatever the manifest calls it, so it may carry no other role.
_CODE_SUFFIX = re.compile(r"\.(pt2?|pth|ckpt|pkl|pickle|joblib|pyc?|so|dll|dylib|o|cubin|fatbin|ptx)$", re.IGNORECASE)
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an artifact. Raises IntegrityError when a field is not valid."""

    path: str
    size: int
    digest: str
    role: str
    algorithm: str = "sha256"

    def __post_init__(self) -> None:
        check_path(self.path)
        if type(self.size) is not int or not 0 <= self.size < 2**63:
            raise _invalid(f"{self.path}: the size {self.size!r} is not an integer from 0 to 2^63 - 1")
        if self.algorithm != "sha256":
            raise _invalid(f"{self.path}: the algorithm {self.algorithm!r} is not 'sha256'")
        if not isinstance(self.digest, str) or not _DIGEST.fullmatch(self.digest):
            raise _invalid(f"{self.path}: the digest {self.digest!r} is not 64 lowercase hexadecimal digits")
        if self.role not in ROLES:
            raise _invalid(f"{self.path}: the role {self.role!r} is not one of {', '.join(ROLES)}")
        if _CODE_SUFFIX.search(self.path) and self.role != "code":
            raise _invalid(f"{self.path}: loading such a file can run code, so its role is 'code', not {self.role!r}")


@dataclass(frozen=True)
class Manifest:
    """Contents of an artifact and how it was made.

    `files` is sorted by path, and `root_digest` and `trust` follow from it. Raises IntegrityError when a field is not
    valid, and TypeError or ValueError for a value that canonical JSON does not have.
    """

    name: str
    target: str
    files: tuple[FileEntry, ...]
    source: tuple[Mapping[str, Any], ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    passes: tuple[Mapping[str, Any], ...] = ()
    toolchain: Mapping[str, Any] = field(default_factory=dict)
    numerics: tuple[Mapping[str, Any], ...] = ()
    schema: str = SCHEMA

    def __post_init__(self) -> None:
        _check_schema(self.schema)
        for text in ("name", "target"):
            if not isinstance(getattr(self, text), str) or not getattr(self, text):
                raise _invalid(f"{text} is not a string, or empty")
        paths = [entry.path for entry in self.files]
        check_collisions(paths)
        if paths != sorted(paths):
            raise _invalid("its files are not sorted by path")
        for name in ("recipe", "toolchain"):
            # A private copy whose tuples are lists, so that equal manifests compare equal.
            object.__setattr__(self, name, _plain_mapping(name, getattr(self, name)))
        for name in ("source", "passes", "numerics"):
            items = getattr(self, name)
            if not isinstance(items, (list, tuple)):
                raise _invalid(f"{name} is not a list")
            object.__setattr__(self, name, tuple(_plain_mapping(name, item) for item in items))
        for record in self.passes:
            _check_pass(record)

    @property
    def root_digest(self) -> str:
        """SHA-256 over the raw digests of all files in the order of their paths."""
        return hashlib.sha256(b"".join(bytes.fromhex(entry.digest) for entry in self.files)).hexdigest()

    @property
    def trust(self) -> dict[str, list[str]]:
        """The files that run code when they are loaded."""
        return {"code": [entry.path for entry in self.files if entry.role == "code"]}

    @property
    def id(self) -> str:
        """The identity of the artifact: `sha256:` of the manifest's bytes."""
        return "sha256:" + hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def total_bytes(self) -> int:
        """The size of all listed files together."""
        return sum(entry.size for entry in self.files)

    def entry(self, path: str) -> FileEntry | None:
        """Return the entry of one path, or None when the artifact has no such file."""
        return next((entry for entry in self.files if entry.path == path), None)

    def to_bytes(self) -> bytes:
        """Return the bytes of manifest.json."""
        files = [{name: getattr(entry, name) for name in _FILE_KEYS} for entry in self.files]
        return canonical_json({name: getattr(self, name) for name in _TOP_KEYS} | {"files": files})

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parse manifest.json. Raises IntegrityError, or IncompatibleError for another major version of the schema."""
        value = parse_canonical(data)
        if not isinstance(value, dict):
            raise _invalid("it is not a JSON object")
        _check_schema(value.get("schema"))
        _check_keys("it", value, _TOP_KEYS)
        if not isinstance(value["files"], list):
            raise _invalid("files is not a list")
        if len(value["files"]) > MAX_FILES:
            raise _invalid(f"it lists {len(value['files'])} files; the limit is {MAX_FILES}")
        for number, item in enumerate(value["files"]):
            _check_keys(f"files[{number}]", item, _FILE_KEYS)
        derived = {name: value.pop(name) for name in _DERIVED}
        manifest = cls(**value | {"files": tuple(FileEntry(**item) for item in value["files"])})
        for name in sorted(_DERIVED):
            if derived[name] != getattr(manifest, name):
                raise _invalid(f"{name} does not follow from its files")
        return manifest

    def sums(self) -> bytes:
        """Return the bytes of SHA256SUMS: every file and the manifest itself, as `sha256sum --check --strict` reads them."""
        digests = {entry.path: entry.digest for entry in self.files}
        digests[MANIFEST_NAME] = hashlib.sha256(self.to_bytes()).hexdigest()
        return "".join(f"{digests[path]}  {path}\n" for path in sorted(digests)).encode()


_FILE_KEYS = frozenset(field.name for field in fields(FileEntry))
_DERIVED = frozenset({"root_digest", "trust"})
_PASS_DETAILS = ("decisions", "calibration")
"""Optional keys of a pass's record, about each layer."""
_TOP_KEYS = frozenset(field.name for field in fields(Manifest)) | _DERIVED


def _check_schema(schema: object) -> None:
    if not isinstance(schema, str) or not re.fullmatch(r"vlmbuild\.artifact/[0-9]{1,9}", schema):
        raise IntegrityError(
            f"{MANIFEST_NAME} has the schema {schema!r}, so it is not a vlmbuild artifact's. Give the folder that "
            "`vlmbuild build` wrote."
        )
    if schema not in READABLE:
        raise IncompatibleError(
            f"{MANIFEST_NAME} has the schema {schema}; this vlmbuild reads {' and '.join(READABLE)}. Install a vlmbuild "
            "that reads it, or build the artifact again."
        )


def _check_keys(where: str, value: object, expected: frozenset[str]) -> None:
    if not isinstance(value, dict):
        raise _invalid(f"{where} is not a JSON object")
    if wrong := sorted(expected.symmetric_difference(value)):
        raise _invalid(f"{where} has missing or unknown keys: {', '.join(wrong)}")


def _check_pass(record: Mapping[str, Any]) -> None:
    required = {key: value for key, value in record.items() if key not in _PASS_DETAILS}
    _check_keys("an entry of passes", required, frozenset({"name", "matches", "refusals"}))
    if not isinstance(record["name"], str) or not isinstance(record["refusals"], list):
        raise _invalid("an entry of passes has a name that is not a string, or refusals that are not a list")
    if type(record["matches"]) is not int or record["matches"] < 0:
        raise _invalid(f"the pass {record['name']!r} has the match count {record['matches']!r}")


def _plain_mapping(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _invalid(f"{name} holds something that is not a JSON object")
    plain: dict[str, Any] = plain_json(value, name, 1)
    return plain


def _invalid(problem: str) -> IntegrityError:
    return IntegrityError(f"{MANIFEST_NAME} is not valid: {problem}. Build the artifact again or copy it again.")

"""Signatures of artifacts by OpenSSF model signing: `model.sig` beside the manifest signs the digest of every file."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.output import output_errors
from vlmbuild.artifact.paths import MANIFEST_NAME, SUMS_NAME
from vlmbuild.artifact.reader import verify
from vlmbuild.errors import IntegrityError, UsageError

SIGNATURE: Final = "model.sig"
_IGNORED = (SIGNATURE, "README.md", ".cache")
"""Files that a signature leaves out, beside those of git, which the library leaves out by itself."""
_MAX_BYTES = 64 * 2**20


class ManifestDigests:
    """The digests of an artifact's manifest, in place of the library's own reading of all files: `verify` has read them.

    It stands in for `model_signing.hashing.Config`, whose signatures are the same.
    """

    def __init__(self, manifest: Manifest, name: str) -> None:
        self._digests = {entry.path: entry.digest for entry in manifest.files}
        for path, data in ((MANIFEST_NAME, manifest.to_bytes()), (SUMS_NAME, manifest.sums())):
            self._digests[path] = hashlib.sha256(data).hexdigest()
        self._name = name

    def hash(self, _path: object, *, files_to_hash: Iterable[object] | None = None) -> Any:
        """Return the library's manifest of the artifact."""
        manifest, digest = _package("manifest"), _package("_hashing.hashing").Digest
        options = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": list(_IGNORED)}
        form = manifest.SerializationType.from_args(options)
        items = [form.new_item(path, digest("sha256", bytes.fromhex(text))) for path, text in self._digests.items()]
        return manifest.Manifest(self._name, items, form)

    def add_ignored_paths(self, *, model_path: object, paths: object) -> None:
        """Ignore what a signature says that it leaves out: the manifest lists what is to be signed."""


def sign(path: Path, private_key: Path) -> Manifest:
    """Verify an artifact, and sign it.

    Args:
        path: The artifact; `model.sig` is written into it, over an earlier one.
        private_key: PEM file of an unencrypted elliptic-curve key (P-256, P-384 or P-521).

    Raises:
        UsageError: The key cannot be used, or the package is not installed.
        IntegrityError: A file differs from the manifest.
        OutputError: The signature cannot be written.
    """
    signing = _package("signing")
    with _key_errors(private_key):
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    path, manifest = path.absolute(), verify(path)
    temporary = path.parent / f".{path.name}.{SIGNATURE}"
    with output_errors(path):
        try:
            config.set_hashing_config(ManifestDigests(manifest, path.name)).sign(path, temporary)
            temporary.replace(path / SIGNATURE)
        finally:
            temporary.unlink(missing_ok=True)
    return manifest


def check_signature(path: Path, public_key: Path, manifest: Manifest) -> None:
    """Check the signature of an artifact, which proves its manifest; `verify` proves its files by the manifest.

    Args:
        path: The artifact.
        public_key: PEM file.
        manifest: The artifact's manifest.

    Raises:
        UsageError: The key cannot be used, or the package is not installed.
        IntegrityError: There is no signature, another key made it, or it is of other files.
    """
    verifying = _package("verifying")
    with _key_errors(public_key):
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    file = path / SIGNATURE
    if not file.is_file():
        raise IntegrityError(f"{path} has no {SIGNATURE}. Sign it with `vlmbuild sign`, or drop --public-key.")
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        config.set_hashing_config(ManifestDigests(manifest, path.name)).verify(path, file)
    except Exception as error:  # whatever the library and those that it builds upon raise for what is not a signature
        raise IntegrityError(
            f"{file} does not prove that the owner of {public_key} signed {path} ({_said(error)}). Get the "
            f"artifact and its {SIGNATURE} again, or the key that belongs to it."
        ) from error


def _package(module: str) -> Any:
    """Import a module of the package, which is optional and annotated in part. Raises UsageError."""
    try:
        importlib.import_module("model_signing")
        return importlib.import_module(f"model_signing.{module}")
    except ImportError as error:
        raise UsageError(
            "Signatures need the package model-signing, which is not installed. Install it: pip install 'vlmbuild[sign]'."
        ) from error


def _said(error: Exception) -> str:
    """Return what a library says, without the end of its sentence; of another kind of key it says nothing to users."""
    return "of another kind" if isinstance(error, AttributeError) else " ".join(str(error).split()).rstrip(" .?")


@contextmanager
def _key_errors(key: Path) -> Iterator[None]:
    """Turn what the library raises for a key into UsageError."""
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError) as error:  # TypeError: it is encrypted
        raise UsageError(
            f"{key} is not a key for signatures ({_said(error)}). Pass an unencrypted elliptic-curve key in PEM, as `openssl "
            "ecparam -genkey -name prime256v1 -noout -out key.pem` makes one, or the public half, from `openssl ec -in "
            "key.pem -pubout`."
        ) from error

"""Publishing an artifact on the hub: one commit, which replaces the artifact that a branch holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from vlmbuild.artifact.canonical import MAX_BYTES
from vlmbuild.artifact.files import read_file
from vlmbuild.artifact.hub import HUB_ID, download, is_card_or_signature, is_extra
from vlmbuild.artifact.manifest import Manifest
from vlmbuild.artifact.paths import MANIFEST_NAME, SUMS_NAME
from vlmbuild.artifact.reader import ArtifactReader
from vlmbuild.errors import ArtifactError, OutputError, SourceError, UsageError, VlmbuildError
from vlmbuild.util.progress import Progress
from vlmbuild.util.text import listed

CARD: Final = "README.md"
_ATTRIBUTES = ".gitattributes"
_WHOLE_BYTES = 5 * 2**20
"""Size up to which a file is sent as the bytes that were verified. Larger ones are read again, by their digest."""
_AT_ONCE = 5
"""Files that are uploaded at the same time; progress is counted after each such group."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A branch of a repository on the hub.

    Attributes:
        repository, branch: Names.
        exists: True if there is such a repository.
        commit: Its commit; None if there is no such branch.
        private: True if others cannot see the repository.
        paths: Files on the branch, or, if it is to be made, on the default branch.
        artifact: The artifact among them.
    """

    repository: str
    branch: str
    exists: bool = False
    commit: str | None = None
    private: bool = False
    paths: tuple[str, ...] = ()
    artifact: Manifest | None = None

    def foreign(self) -> list[str]:
        """List files that are neither an artifact's nor the hub's own."""
        known = {MANIFEST_NAME, SUMS_NAME, *(entry.path for entry in self.artifact.files)} if self.artifact else ()
        return [path for path in self.paths if path not in known and not is_extra(path, known)]


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload that has been checked.

    Attributes:
        remote: Where it goes.
        files: Path -> size of each file of the commit, the model card among them.
        removed: Files that the same commit deletes.
        card: Text of the model card.
    """

    remote: Remote
    files: dict[str, int]
    removed: tuple[str, ...]
    card: str


def check_repository(name: str) -> None:
    """Raise UsageError for a name that no repository on the hub can have."""
    match = HUB_ID.fullmatch(name)
    if match is None or match[2] is not None:
        raise UsageError(
            f"{name!r} is not the name of a repository. Pass owner/name, in letters, digits, '-', '_', '.'."
        )


def check_token() -> None:
    """Raise OutputError without a token that the hub knows."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise OutputError(
            "There is no token for the hub. Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
        )
    with _hub_errors("The token of the hub cannot be checked", "Check the network (or HF_HUB_OFFLINE)."):
        HfApi().whoami()


def read_remote(repository: str, branch: str) -> Remote:
    """Ask the hub what a branch holds. Raises OutputError if it cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    with _hub_errors(f"{repository} cannot be read", "Check the network (or HF_HUB_OFFLINE), and run it again."):
        try:
            info = HfApi().model_info(repository, revision=branch)
            commit = info.sha
        except RevisionNotFoundError:
            info, commit = HfApi().model_info(repository), None
        except RepositoryNotFoundError:
            return Remote(repository, branch)
    paths = tuple(sorted(sibling.rfilename for sibling in info.siblings or ()))
    artifact = _artifact(repository, str(info.sha)) if MANIFEST_NAME in paths else None
    return Remote(repository, branch, True, commit, bool(info.private), paths, artifact)


def _artifact(repository: str, commit: str) -> Manifest | None:
    """Read the manifest of an artifact on the hub; None for other files of that name."""
    try:
        file = download(repository, commit, [MANIFEST_NAME]) / MANIFEST_NAME
        return Manifest.from_bytes(read_file(file.resolve(), MAX_BYTES))
    except (ArtifactError, SourceError, OSError, ValueError):
        return None


def prepare(reader: ArtifactReader, remote: Remote, card: str, *, private: bool, overwrite: bool) -> Upload:
    """List what a commit adds and deletes.

    Args:
        reader: The artifact.
        remote: Where it goes.
        card: Text of the model card.
        private: Make a new repository private.
        overwrite: Delete files that are not an artifact's.

    Raises:
        OutputError: The branch holds such files, or the repository is public and should be private.
    """
    name, foreign = remote.repository, remote.foreign()
    if foreign and not overwrite:
        raise OutputError(
            f"{name} holds files that are not an artifact's: {listed(foreign)}. Push to another repository or --revision, "
            "or pass --overwrite to delete them in the same commit."
        )
    if private and remote.exists and not remote.private:
        raise OutputError(
            f"{name} exists and is public. Drop --private, or change its visibility in its settings first."
        )
    manifest = reader.manifest
    files = {entry.path: entry.size for entry in manifest.files}
    files |= {MANIFEST_NAME: len(manifest.to_bytes()), SUMS_NAME: len(manifest.sums()), CARD: len(card.encode())}
    files |= {path.name: path.stat().st_size for path in _signatures(reader)}
    removed = tuple(path for path in remote.paths if path not in files and path != _ATTRIBUTES)
    return Upload(remote, dict(sorted(files.items())), removed, card)


def _signatures(reader: ArtifactReader) -> list[Any]:
    """Return the signatures and attestations beside an artifact."""
    return [path for path in sorted(reader.path.iterdir()) if is_card_or_signature(path.name) and path.name != CARD]


def publish(reader: ArtifactReader, upload: Upload, message: str, *, private: bool, progress: Progress) -> str:
    """Verify an artifact, upload its files, and publish them in one commit.

    Args:
        reader: The artifact.
        upload: From `prepare`.
        message: First line of the commit's message.
        private: Make a new repository private.
        progress: Called with a stage's name, the bytes done, and the total.

    Returns:
        The commit.

    Raises:
        IntegrityError: A file differs from the manifest, or changed while it was uploaded; nothing is published.
        OutputError: The hub refuses it or cannot be reached; nothing is published.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, remote = HfApi(), upload.remote
    name, branch = remote.repository, remote.branch
    with reader.verifying(first=True, progress=lambda done, total: progress("verify", done, total)):
        additions = [CommitOperationAdd(path, data) for path, data in _contents(reader, upload)]
        for addition in additions:
            if entry := reader.manifest.entry(addition.path_in_repo):
                addition.upload_info.sha256 = bytes.fromhex(entry.digest)
        paths = {addition.upload_info.sha256.hex(): addition.path_in_repo for addition in additions}
        with _hub_errors(f"The upload to {name} failed, and nothing was published", _RETRY, paths):
            if remote.commit is None:
                remote = _make_branch(api, remote, private=private)
            done, total = 0, sum(upload.files.values())
            progress("upload", done, total)
            for start in range(0, len(additions), _AT_ONCE):
                group = additions[start : start + _AT_ONCE]
                # A .gitignore that the branch holds would leave files out silently.
                options: dict[str, Any] = {"gitignore_content": "", "free_memory": False, "num_threads": _AT_ONCE}
                api.preupload_lfs_files(name, group, revision=branch, **options)
                done += sum(addition.upload_info.size for addition in group)
                progress("upload", done, total)
    deletions = [CommitOperationDelete(path, is_folder=False) for path in upload.removed]
    with _hub_errors(f"The commit to {name} failed", _RETRY):  # it has arrived, perhaps, and its answer is lost
        made = api.create_commit(
            name, [*deletions, *additions], commit_message=message, revision=branch, parent_commit=remote.commit
        )
    return str(made.oid)


def _make_branch(api: Any, remote: Remote, *, private: bool) -> Remote:
    """Make the repository and the branch, where they are missing."""
    from huggingface_hub import constants

    if not remote.exists:
        api.create_repo(remote.repository, private=private or None, exist_ok=True)
    if remote.branch != constants.DEFAULT_REVISION:
        api.create_branch(remote.repository, branch=remote.branch, exist_ok=True)
    return read_remote(remote.repository, remote.branch)


def _contents(reader: ArtifactReader, upload: Upload) -> Iterator[tuple[str, bytes | str]]:
    """Yield (path, verified bytes or local path) of every file of a commit."""
    own = {
        MANIFEST_NAME: reader.manifest.to_bytes(),
        SUMS_NAME: reader.manifest.sums(),
        CARD: upload.card.encode(),
    }
    for path, size in upload.files.items():
        if path in own:
            yield path, own[path]
        elif reader.manifest.entry(path) is None:  # a signature
            yield path, (reader.path / path).read_bytes()
        else:
            yield path, reader.read(path) if size <= _WHOLE_BYTES else str((reader.path / path).absolute())


_RETRY = "Check the network and run the command again: what has arrived is not sent again."
_ADVICE = {
    401: "The token is not accepted: log in with `hf auth login`, or set HF_TOKEN to one that may write.",
    403: "The token may not write there: use a token with write access, and a repository of yours or your organization's.",
    412: "Somebody else wrote to the branch at the same time: run the command again.",
    413: "A file or the commit is too large for the hub: build with smaller shards, or ask the hub for a larger limit.",
}
"""HTTP status -> what to do."""


@contextmanager
def _hub_errors(what: str, advice: str, paths: dict[str, str] | None = None) -> Iterator[None]:
    """Turn errors of huggingface_hub into OutputError.

    Args:
        what: What failed.
        advice: What to do, if the hub's status does not say.
        paths: SHA-256 -> path of the files that are uploaded, which the hub's messages name by digest.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    network: Any = HfHubHTTPError.__bases__[0]  # of httpx or of httpx2, by the version of huggingface_hub
    try:
        yield
    except VlmbuildError:
        raise
    except (network, OSError, ValueError, RuntimeError) as error:
        cause: Any = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        reason = " ".join(str(error if cause is error else f"{error} {cause}").split())
        if "LFS batch API returned errors" in reason:
            status = 413
        for digest, path in (paths or {}).items():
            reason = re.sub(rf"\bfile with OID {digest}\b", path, reason)
        if not constants.HF_HUB_DISABLE_XET and "xet" in reason.lower():
            advice = "If the server has no xet storage, set HF_HUB_DISABLE_XET=1 to upload by LFS."
        raise OutputError(f"{what}: {reason.rstrip('.')}. {_ADVICE.get(status or 0, advice)}") from error

"""The command `vlmbuild push`."""

from __future__ import annotations

from pathlib import Path

import click

from vlmbuild.artifact.hub import artifact_directory
from vlmbuild.artifact.reader import ArtifactReader, verify
from vlmbuild.artifact.upload import Remote, check_repository, check_token, prepare, publish, read_remote
from vlmbuild.cli.options import json_option
from vlmbuild.cli.output import StageProgress, show
from vlmbuild.errors import OutputError, UsageError
from vlmbuild.report.contents import contents
from vlmbuild.report.model_card import model_card, own_card
from vlmbuild.report.tables import push_report


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--revision", "branch", default="main", show_default=True, metavar="BRANCH", help="Branch; made if new.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--message", metavar="TEXT", help="First line of the commit's message.  [default: name and id]")
@click.option("--base-model", metavar="OWNER/NAME", help="Base model of the card.  [default: the manifest's source]")
@click.option("--overwrite", is_flag=True, help="Delete files of the branch that are not an artifact's.")
@click.option("--dry-run", is_flag=True, help="Verify, and print what would be uploaded and the model card.")
@json_option
def command(
    artifact: Path,
    repository: str,
    branch: str,
    private: bool,
    message: str | None,
    base_model: str | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Publish an artifact on the hub, with a model card.

    Verifies every file, writes README.md from the manifest, and uploads all in one commit, which replaces the
    artifact that the branch holds: its readers see the old one or the new one. vlmbuild.load("OWNER/NAME")
    then gives the same artifact id (GGUF files are opened by llama.cpp). A README.md of your own in the folder is
    uploaded in place of the card.

    ARTIFACT is a folder, or the hub id of an artifact to publish again.

    \b
    Examples:
        vlmbuild push qwen2-vl-nf4 me/qwen2-vl-nf4 --dry-run
        vlmbuild push qwen2-vl-nf4 me/qwen2-vl-nf4 --private
        vlmbuild push qwen2-vl-q8 me/qwen2-vl-gguf --revision q8
        vlmbuild push my-gguf me/my-gguf --base-model Qwen/Qwen2-VL-2B-Instruct
    """
    check_repository(repository)
    note = ""
    with StageProgress(lines=not as_json) as progress:
        directory = artifact_directory(artifact)
        document = contents(directory)
        if not dry_run:
            check_token()
        try:
            remote = read_remote(repository, branch)
        except OutputError as error:
            if not dry_run:
                raise
            remote, note = Remote(repository, branch), str(error)
        reader = ArtifactReader(directory, verify=False, expected_id=document["id"])
        own = own_card(directory) if artifact.is_dir() else None  # a downloaded one has the card of another place
        if own is not None and base_model is not None:
            raise UsageError(
                f"--base-model is for a new card, and {directory}/README.md would be uploaded. Remove the file, or write "
                "its base_model there."
            )
        card = own or model_card(reader, document, (repository, branch), base_model)
        upload = prepare(reader, remote, card, private=private, overwrite=overwrite)
        if dry_run:
            verify(directory, progress=lambda done, total: progress("verify", done, total))
            commit = None
        else:
            text = message or f"Publish {document['name']} {document['id'][:19]}"
            commit = publish(reader, upload, text, private=private, progress=progress)
    result = {
        "path": str(directory),
        "id": document["id"],
        "repository": repository,
        "branch": branch,
        "commit": commit,
        "new": not remote.exists,
        "private": remote.private if remote.exists else private,
        "replaces": remote.artifact.id if remote.artifact else None,
        "files": [{"path": path, "bytes": size} for path, size in upload.files.items()],
        "bytes": sum(upload.files.values()),
        "removed": list(upload.removed),
        "card": card,
        "note": note,
    }
    show(result, push_report, as_json=as_json)

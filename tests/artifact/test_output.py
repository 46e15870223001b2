"""Where an artifact may be written: refused before any work, with what to do instead."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vlmbuild.artifact.output import cannot_write, check_output
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.errors import OutputError


def refused(output, words, *, overwrite=False):
    with pytest.raises(OutputError, match=words) as caught:
        ArtifactWriter(output, overwrite=overwrite).__enter__()
    assert caught.value.exit_code == 1


def test_exists(tmp_path):
    refused(tmp_path, "exists. Choose another output, or replace it with --overwrite")


@pytest.mark.parametrize("overwrite", [True, False])
def test_file_link_or_root(tmp_path, overwrite):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    refused(tmp_path / "file", "is a file. Choose another", overwrite=overwrite)
    refused(tmp_path / "link", "is a link. Give the path that it points to", overwrite=overwrite)
    refused(tmp_path / "dangling", "is a link", overwrite=overwrite)
    refused("/", "cannot be an output", overwrite=overwrite)


def test_parents(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    refused(tmp_path / "none/art", "none does not exist, so art cannot be made in it. Create it first")
    refused(tmp_path / "file/art", "file is not a folder")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(tmp_path / "art", "is not writable. Change its permissions")


def test_overwrite_spares_what_is_not_an_artifact(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_bytes(b"")
    refused(tmp_path / "mine", "is not a vlmbuild artifact, so --overwrite does not replace it", overwrite=True)
    (tmp_path / "mine/manifest.json").write_text('{"schema": 1, "files": []}')
    refused(tmp_path / "mine", "is not a vlmbuild artifact", overwrite=True)
    (tmp_path / "nested/deep").mkdir(parents=True)
    refused(tmp_path / "nested", "is not a vlmbuild artifact", overwrite=True)


def test_overwrite_spares_files_added_to_an_artifact(tmp_path):
    with ArtifactWriter(tmp_path / "art") as writer:
        writer.write("config.json", b"{}", "config")
        writer.publish(name="m", target="t")
    check_output(tmp_path / "art", overwrite=True)
    (tmp_path / "art/adapter").mkdir()
    (tmp_path / "art/adapter/a.safetensors").write_bytes(b"")
    (tmp_path / "art/b").symlink_to(tmp_path)
    refused(tmp_path / "art", "not part of it: adapter/a.safetensors, b. Move them", overwrite=True)


def test_overwrite_takes_damaged_and_newer_artifacts(tmp_path):
    (tmp_path / "art").mkdir()
    (tmp_path / "art/x").write_bytes(b"")
    (tmp_path / "art/manifest.json").write_text('{"schema": "vlmbuild.artifact/9", "files": [{"path": "x"}]}')
    check_output(tmp_path / "art", overwrite=True)
    (tmp_path / "art/x").unlink()
    check_output(tmp_path / "art", overwrite=True)


def test_the_file_that_failed_is_named():
    error = OSError(errno.EIO, "Input/output error", "/x/.out.staging-a-b/graph/program.json")
    assert "/x/out/graph/program.json cannot be written: Input/output error" in str(cannot_write(Path("/x/out"), error))
    assert "/x/out cannot be written" in str(cannot_write(Path("/x/out"), OSError(errno.EIO, "Input/output error")))

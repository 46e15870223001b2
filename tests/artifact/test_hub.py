"""Artifacts as the hub hands them over: links into its cache, its own files, signatures. Everything else stays refused."""

from __future__ import annotations

import os
import shutil

import pytest
from hub_cache import COMMIT, cached
from huggingface_hub import _local_folder, constants

from vlmbuild.artifact.hub import artifact_directory, download
from vlmbuild.artifact.reader import ArtifactReader, verify
from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.errors import IntegrityError, SourceError, UsageError

CONTENT = {"config.json": (b"{}", "config"), "graph/program.txt": (b"one", "graph")}


@pytest.fixture
def artifact(tmp_path):
    with ArtifactWriter(tmp_path / "art") as writer:
        for path, (data, role) in CONTENT.items():
            writer.write(path, data, role)
        writer.publish(name="m", target="trainable")
    return tmp_path / "art"


@pytest.mark.parametrize("absolute", [True, False])
def test_a_snapshot_is_verified_as_its_files(artifact, tmp_path, absolute):
    snapshot = cached(artifact, tmp_path / "hub", absolute=absolute, shared=["graph/program.txt"])
    assert verify(snapshot) == verify(artifact)
    (tmp_path / "latest").symlink_to(snapshot)
    reader = ArtifactReader(tmp_path / "latest")
    assert reader.read("graph/program.txt") == b"one"
    with reader.copied("config") as copy:
        assert not (copy / "config.json").is_symlink()
    reader.check_unchanged(by_name=True)


def test_contents_of_blobs_are_verified(artifact, tmp_path):
    snapshot = cached(artifact, tmp_path / "hub")
    (snapshot / "config.json").resolve().write_bytes(b"[]")
    with pytest.raises(IntegrityError, match="changed: config.json"):
        verify(snapshot)
    (snapshot / "config.json").resolve().write_bytes(b"[] ")
    with pytest.raises(IntegrityError, match=r"too long: config.json \(3 bytes of 2\)"):
        verify(snapshot)
    blob = (snapshot / "config.json").resolve()
    blob.unlink()
    with pytest.raises(IntegrityError, match="links: config.json"):
        verify(snapshot)
    os.mkfifo(blob)
    with pytest.raises(IntegrityError, match="links: config.json"):
        verify(snapshot)


@pytest.mark.parametrize("place", ["outside", "hub/models--owner--name/refs/x", "hub/models--other--name/blobs/x"])
def test_links_that_leave_the_cache_are_refused(artifact, tmp_path, place):
    snapshot = cached(artifact, tmp_path / "hub")
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes(b"{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / place)
    with pytest.raises(IntegrityError, match="links: config.json.*cp -rL"):
        verify(snapshot)
    folder = snapshot / "graph"
    shutil.rmtree(folder)
    folder.symlink_to(artifact / "graph")
    with pytest.raises(IntegrityError, match="links: config.json, graph"):
        verify(snapshot)


def test_links_are_refused_outside_of_the_cache(artifact, tmp_path):
    snapshot = cached(artifact, tmp_path / "hub")
    moved = tmp_path / "hub/models--owner--name/elsewhere"
    moved.mkdir()
    os.rename(snapshot, moved / COMMIT)
    with pytest.raises(IntegrityError, match="manifest.json cannot be read: it is a link"):
        verify(moved / COMMIT)


def test_a_local_directory_of_the_hub(artifact):
    for name in (*CONTENT, "manifest.json", "SHA256SUMS", "README.md"):
        _local_folder.write_download_metadata(artifact, name, COMMIT, "etag")
        _local_folder.get_local_download_paths(artifact, name).lock_path.touch()
    (artifact / "README.md").write_text("# card")
    (artifact / ".gitattributes").write_text("* -text")
    verify(artifact)


@pytest.mark.parametrize("name", ["model.sig", "provenance.intoto.jsonl"])
def test_signatures_lie_beside_the_manifest(artifact, name):
    (artifact / name).write_bytes(b"{}")
    verify(artifact)
    (artifact / name).rename(artifact / "graph" / name)
    with pytest.raises(IntegrityError, match=f"not listed in the manifest: graph/{name}. Move"):
        verify(artifact)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "readme.md",
            "docs/README.md",
            ".gitattributes.py",
            "sig",
            "model.sig.py",
            "chat_template.jinja",
            ".gitignore",
        ),
        *(".cache/huggingface/x", ".cache/huggingface/download/other.metadata", ".cache/x"),
        ".cache/huggingface/download/config.json",
    ],
)
def test_other_names_stay_refused(artifact, name):
    (artifact / name).parent.mkdir(parents=True, exist_ok=True)
    (artifact / name).write_bytes(b"")
    with pytest.raises(IntegrityError, match=f"not listed in the manifest: {name}. Move"):
        verify(artifact)


def test_extra_names_are_files(artifact):
    (artifact / "README.md").symlink_to("config.json")
    os.mkfifo(artifact / "model.sig")
    with pytest.raises(IntegrityError, match=r"links: README.md; not plain files: model.sig"):
        verify(artifact)


def test_download_finds_the_cache(artifact, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = cached(artifact, tmp_path / "hub")
    assert download("owner/name", None) == download("owner/name", "main") == download("owner/name", COMMIT) == snapshot
    with pytest.raises(SourceError, match="owner/other.*HF_HUB_OFFLINE"):
        download("owner/other", None)
    with pytest.raises(SourceError, match="owner/name.*HF_HUB_OFFLINE"):
        download("owner/name", "v2")
    seen = []
    assert artifact_directory("owner/name", "main", lambda *step: seen.append(step)) == snapshot
    assert seen == [("download", 0, 1), ("download", 1, 1)]


def test_a_directory_wins_over_a_hub_id_and_has_no_revision(artifact, tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    artifact.rename(tmp_path / "owner/name")
    monkeypatch.chdir(tmp_path)
    assert str(artifact_directory("owner/name")) == "owner/name"
    with pytest.raises(UsageError, match="owner/name is not a hub id.*'v1'"):
        artifact_directory("owner/name", "v1")


def test_weights_of_a_snapshot(tmp_path):
    import safetensors.torch
    import torch

    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    with ArtifactWriter(tmp_path / "art") as writer:
        writer.copy(tmp_path / "one.safetensors", "model.safetensors", "weights")
        writer.publish(name="m", target="trainable")
    reader = ArtifactReader(cached(tmp_path / "art", tmp_path / "hub"))
    assert CheckpointWeights(reader.path, reader.open).map("a").tolist() == [1, 1]

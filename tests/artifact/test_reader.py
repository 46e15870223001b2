"""Verifying: a closed world of plain files, every problem named, and only verified bytes handed out."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmbuild.artifact import files
from vlmbuild.artifact.canonical import canonical_json
from vlmbuild.artifact.reader import ArtifactReader, verify
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.errors import IncompatibleError, IntegrityError

CONTENT = {
    "config.json": (b"{}", "config"),
    "graph/program.json": (b"[1]", "graph"),
    "graph/program.txt": (b"one", "graph"),
    "model.safetensors": (b"weights" * 100, "weights"),
}


def build(output):
    with ArtifactWriter(output) as writer:
        for path, (data, role) in CONTENT.items():
            writer.write(path, data, role)
        return writer.publish(name="m", target="trainable")


@pytest.fixture
def artifact(tmp_path):
    build(tmp_path / "art")
    return tmp_path / "art"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    path = tmp_path_factory.mktemp("pristine") / "art"
    build(path)
    return path


def refused(artifact, words):
    with pytest.raises(IntegrityError, match=words) as caught:
        verify(artifact)
    assert str(artifact) in str(caught.value)
    assert caught.value.exit_code == 3


def test_intact(artifact):
    seen = []
    manifest = verify(artifact, progress=lambda done, total: seen.append((done, total)))
    assert verify(str(artifact), expected_id=manifest.id) == manifest
    assert seen[-1] == (manifest.total_bytes, manifest.total_bytes)


def test_truncated(artifact):
    os.truncate(artifact / "model.safetensors", 699)
    refused(artifact, r"truncated: model.safetensors \(699 bytes of 700\)\. Copy or download")


def test_emptied_and_too_long(artifact):
    os.truncate(artifact / "config.json", 0)
    with (artifact / "graph/program.txt").open("ab") as stream:
        stream.write(b"x")
    refused(artifact, r"truncated: config.json \(0 bytes of 2\); too long: graph/program.txt \(4 bytes of 3\)")


def test_one_bit(artifact):
    path = artifact / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[350] ^= 1
    path.write_bytes(data)
    refused(artifact, "changed: model.safetensors")


def test_swapped_files_are_both_named(artifact):
    first, second = artifact / "graph/program.json", artifact / "graph/program.txt"
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    refused(
        artifact,
        r"changed: graph/program.json \(holds the content of graph/program.txt\), "
        r"graph/program.txt \(holds the content of graph/program.json\)",
    )


def test_all_missing_files_are_named(artifact):
    (artifact / "config.json").unlink()
    (artifact / "SHA256SUMS").unlink()
    refused(artifact, "missing: SHA256SUMS, config.json")


@pytest.mark.parametrize("name", ["extra", ".hidden", ".git/x", "__pycache__/x.pyc", "graph/model.sig"])
def test_extra_files(artifact, name):
    (artifact / name).parent.mkdir(exist_ok=True)
    (artifact / name).write_bytes(b"")
    refused(artifact, f"not listed in the manifest: {name}")


def test_names_that_would_confuse_a_terminal_are_quoted(artifact):
    (artifact / "a\x1b[2J").write_bytes(b"")
    refused(artifact, r"manifest: 'a\\x1b\[2J'")


def test_empty_folder(artifact):
    (artifact / "graph/new").mkdir()
    refused(artifact, "empty folders: graph/new/")


def test_links(artifact, tmp_path):
    shutil.move(artifact / "config.json", tmp_path / "elsewhere")
    (artifact / "config.json").symlink_to(tmp_path / "elsewhere")
    (artifact / "more").symlink_to(tmp_path)
    refused(artifact, "links: config.json, more")


def test_a_folder_that_is_a_link(artifact, tmp_path):
    shutil.move(artifact / "graph", tmp_path / "graph")
    (artifact / "graph").symlink_to(tmp_path / "graph")
    refused(artifact, "links: graph; missing: graph/program.json, graph/program.txt")


def test_manifest_is_a_link(artifact, tmp_path):
    shutil.move(artifact / "manifest.json", tmp_path / "m")
    (artifact / "manifest.json").symlink_to(tmp_path / "m")
    refused(artifact, r"manifest.json cannot be read: it is a link")


def test_the_artifact_itself_may_be_reached_by_a_link(artifact, tmp_path):
    (tmp_path / "latest").symlink_to(artifact)
    verify(tmp_path / "latest")


def test_special_files_do_not_hang(artifact, monkeypatch):
    (artifact / "config.json").unlink()
    os.mkfifo(artifact / "config.json")
    monkeypatch.chdir(artifact)  # socket paths are short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        refused(artifact, "not plain files: config.json, socket")
    (artifact / "manifest.json").unlink()
    os.mkfifo(artifact / "manifest.json")
    refused(artifact, "manifest.json cannot be read: it is not a regular file")


def test_a_folder_instead_of_a_file(artifact):
    (artifact / "config.json").unlink()
    (artifact / "config.json").mkdir()
    refused(artifact, "empty folders: config.json/; missing: config.json")


def test_hard_links_are_refused_unless_allowed(artifact, tmp_path):
    os.link(artifact / "config.json", tmp_path / "other")
    refused(artifact, "hard links: config.json.*--allow-hardlinks")
    verify(artifact, allow_hardlinks=True)


def test_changed_sums(artifact):
    path = artifact / "SHA256SUMS"
    path.write_bytes(path.read_bytes().replace(b"config", b"confih"))
    refused(artifact, "changed: SHA256SUMS")


def test_problems_of_all_kinds_come_together(artifact):
    (artifact / "extra").write_bytes(b"")
    (artifact / "config.json").write_bytes(b"[]")
    (artifact / "model.safetensors").unlink()
    refused(artifact, "missing: model.safetensors; not listed in the manifest: extra; changed: config.json")


def test_consistent_edit_changes_the_id(artifact, tmp_path):
    expected = verify(artifact).id
    with ArtifactWriter(tmp_path / "other") as writer:
        other = writer.publish(name="m", target="trainable")
    with pytest.raises(IntegrityError, match=f"expected {expected}, found {other.id}"):
        verify(tmp_path / "other", expected_id=expected)


def test_not_an_artifact(tmp_path):
    refused(tmp_path, "is not an artifact: it has no manifest.json")
    with pytest.raises(IntegrityError, match="There is no artifact at"):
        verify(tmp_path / "none")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(IntegrityError, match="is not a folder"):
        verify(tmp_path / "file")


def test_foreign_and_huge_manifests(artifact):
    (artifact / "manifest.json").write_bytes(canonical_json({"short_name": "web app"}))
    with pytest.raises(IntegrityError, match="not a vlmbuild artifact's"):
        verify(artifact)
    os.truncate(artifact / "manifest.json", 5 * 2**30)  # sparse
    with pytest.raises(IntegrityError, match="larger than"):
        verify(artifact)


def test_too_deep(artifact):
    (artifact / "/".join(["d"] * 40)).mkdir(parents=True)
    refused(artifact, "too many or too deeply nested files")


def test_a_read_error_is_typed(artifact, monkeypatch):
    def broken(descriptor, *, on_chunk=None):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("vlmbuild.artifact.comparison.hash_descriptor", broken)
    refused(artifact, "cannot be read: Input/output error. Check the disk")


def test_interrupted_progress_stops(artifact):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(artifact, progress=interrupt)


def test_verifying_leaves_no_descriptors(artifact):
    before = len(os.listdir("/proc/self/fd"))
    verify(artifact)
    (artifact / "x").write_bytes(b"")
    with pytest.raises(IntegrityError):
        verify(artifact)
    assert len(os.listdir("/proc/self/fd")) == before


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_mutation_is_rejected(pristine, data):
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "art")
        shutil.copytree(pristine, copy)
        names = sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file())
        path = copy / data.draw(st.sampled_from(names))
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "drop", "insert", "cut", "remove", "rename", "swap"])):
            case "flip":
                content[position] ^= data.draw(st.integers(1, 255))
                path.write_bytes(content)
            case "drop":
                path.write_bytes(content[:position] + content[position + 1 :])
            case "insert":
                path.write_bytes(content[:position] + b"\0" + content[position:])
            case "cut":
                path.write_bytes(content[:position])
            case "remove":
                path.unlink()
            case "rename":
                path.rename(path.with_name(path.name + "x"))
            case "swap":
                other = copy / data.draw(st.sampled_from([name for name in names if copy / name != path]))
                path.write_bytes(other.read_bytes())
        with pytest.raises((IntegrityError, IncompatibleError)):
            verify(copy, expected_id=verify(pristine).id)


def test_reader_reads_what_the_manifest_says(artifact):
    reader = ArtifactReader(artifact, expected_id=verify(artifact).id)
    assert reader.files("graph") == ("graph/program.json", "graph/program.txt")
    assert reader.files("code") == ()
    assert reader.read("config.json") == b"{}"
    reader.check_unchanged()
    with pytest.raises(IncompatibleError, match=r"target trainable\) has no file 'onnx/x.onnx'"):
        reader.read("onnx/x.onnx")


@pytest.mark.parametrize("check", [True, False])
def test_reader_refuses_a_file_changed_later(artifact, check):
    reader = ArtifactReader(artifact, verify=check)
    (artifact / "config.json").write_bytes(b"[]")
    with pytest.raises(IntegrityError, match="config.json is not what manifest.json says"):
        reader.read("config.json")


def test_reader_reads_the_file_that_it_verified(artifact):
    reader = ArtifactReader(artifact)
    (artifact / "other").write_bytes(b"[]")
    os.replace(artifact / "other", artifact / "config.json")
    assert reader.read("config.json") == b"{}"
    (artifact / "config.json").unlink()
    with reader.copied("config") as copy:
        assert (copy / "config.json").read_bytes() == b"{}"
    reader.check_unchanged()
    with pytest.raises(IntegrityError, match="changed while it was loaded: config.json"):
        reader.check_unchanged(by_name=True)


def test_where_nothing_can_be_written_files_are_read_by_name(artifact, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryDirectory", lambda **_: (_ for _ in ()).throw(FileNotFoundError(2, "none")))
    reader = ArtifactReader(artifact, verify=False)
    with reader.verifying(), reader.copied("config") as folder:
        assert folder == artifact
    with (
        pytest.raises(IntegrityError, match="changed while it was loaded: config.json"),
        reader.verifying(),
        reader.copied("config"),
    ):
        shutil.copy(artifact / "config.json", artifact / "copy")
        os.replace(artifact / "copy", artifact / "config.json")


def test_reader_without_verifying_opens_a_file_when_it_is_read(artifact):
    reader = ArtifactReader(artifact, verify=False)
    (artifact / "config.json").unlink()
    with pytest.raises(IntegrityError, match="config.json cannot be read: No such file"):
        reader.read("config.json")


def test_reader_without_verifying_still_checks_the_id(artifact):
    with pytest.raises(IntegrityError, match="expected sha256:0, found"):
        ArtifactReader(artifact, verify=False, expected_id="sha256:0")


def test_reader_notices_replaced_files(artifact):
    reader = ArtifactReader(artifact)
    copy = artifact / "copy"
    shutil.copy2(artifact / "config.json", copy)
    os.replace(copy, artifact / "config.json")  # same bytes, another file
    (artifact / "model.safetensors").unlink()
    with pytest.raises(IntegrityError, match="changed while it was loaded: config.json, model.safetensors"):
        reader.check_unchanged(by_name=True)


def test_open_beneath_follows_no_link_on_the_way(artifact, tmp_path):
    (tmp_path / "inner").symlink_to(artifact / "graph")
    with files.closing(files.open_directory(tmp_path)) as root, pytest.raises(OSError):
        files.open_beneath(root, "inner/program.json")

"""Writing: all or nothing, on any failure, and the same bytes from the same inputs."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from vlmbuild.artifact import staging
from vlmbuild.artifact.reader import verify
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.errors import IntegrityError, OutputError, SourceError

ROOT = Path(__file__).parents[2]


def build(output, *, data=b"{}", overwrite=False):
    with ArtifactWriter(output, overwrite=overwrite) as writer:
        writer.write("config.json", data, "config")
        writer.write("graph/program.txt", b"one", "graph")
        return writer.publish(name="m", target="trainable", toolchain={"torch": "2"})


def test_published_files(tmp_path):
    manifest = build(tmp_path / "art")
    assert verify(tmp_path / "art") == manifest
    assert os.listdir(tmp_path) == ["art"]
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == [
        f"art{name}" for name in ("", "/SHA256SUMS", "/config.json", "/graph", "/graph/program.txt", "/manifest.json")
    ]


def test_sha256sum_agrees(tmp_path):
    build(tmp_path / "art")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=tmp_path / "art", check=True)


@pytest.mark.parametrize("mask", [0o077, 0o000])
def test_modes_do_not_depend_on_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        build(tmp_path / "art")
    finally:
        os.umask(before)
    for path in [tmp_path / "art", *(tmp_path / "art").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644)


def test_nothing_shows_before_publishing(tmp_path):
    with ArtifactWriter(tmp_path / "art") as writer:
        writer.write("config.json", b"{}", "config")
        assert not (tmp_path / "art").exists()
        assert stat.S_IMODE(writer.staging.stat().st_mode) == 0o700
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_removes_the_staging(tmp_path, error):
    with pytest.raises(error), ArtifactWriter(tmp_path / "art") as writer, writer.open("a/b", "data") as file:
        file.write(b"x")
        raise error
    assert os.listdir(tmp_path) == []


def test_outside_the_context(tmp_path):
    with pytest.raises(OutputError, match="is not open. Use it inside"):
        ArtifactWriter(tmp_path / "art").write("a", b"", "data")


def test_overwriting(tmp_path):
    old = build(tmp_path / "art")
    new = build(tmp_path / "art", data=b"[]", overwrite=True)
    assert verify(tmp_path / "art") == new != old
    assert os.listdir(tmp_path) == ["art"]


def test_overwriting_keeps_the_old_one_on_failure(tmp_path):
    old = build(tmp_path / "art")
    with pytest.raises(ValueError), ArtifactWriter(tmp_path / "art", overwrite=True) as writer:
        writer.write("config.json", b"[]", "config")
        raise ValueError
    assert verify(tmp_path / "art") == old
    assert os.listdir(tmp_path) == ["art"]


def test_overwriting_an_empty_folder_or_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    build(tmp_path / "empty", overwrite=True)
    build(tmp_path / "new", overwrite=True)
    verify(tmp_path / "empty")
    verify(tmp_path / "new")


@pytest.mark.parametrize("code", [38, 22])
def test_file_systems_without_the_atomic_renames(tmp_path, monkeypatch, code):
    monkeypatch.setattr(staging, "_renameat2", lambda *arguments: False)
    build(tmp_path / "art")
    new = build(tmp_path / "art", data=b"[]", overwrite=True)
    assert verify(tmp_path / "art") == new
    assert os.listdir(tmp_path) == ["art"]


def test_a_failed_swap_without_atomic_renames_restores(tmp_path, monkeypatch):
    old = build(tmp_path / "art")
    monkeypatch.setattr(staging, "_renameat2", lambda *arguments: False)
    real = os.rename
    count = iter(range(9))

    def rename(source, target):
        if next(count) == 1:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(staging.os, "rename", rename)
    with pytest.raises(OutputError, match="cannot be written: Input/output error"):
        build(tmp_path / "art", data=b"[]", overwrite=True)
    assert verify(tmp_path / "art") == old
    assert os.listdir(tmp_path) == ["art"]


@pytest.mark.parametrize("atomic", [True, False])
def test_two_builders(tmp_path, monkeypatch, atomic):
    if not atomic:
        monkeypatch.setattr(staging, "_renameat2", lambda *arguments: False)
    with ArtifactWriter(tmp_path / "art") as slow:
        slow.write("config.json", b"{}", "config")
        slow.write("graph/program.txt", b"one", "graph")
        fast = build(tmp_path / "art")
        same = slow.publish(name="m", target="trainable", toolchain={"torch": "2"})
    assert same == fast == verify(tmp_path / "art")
    other = tmp_path / "other"
    with pytest.raises(OutputError, match="appeared while this artifact was built"), ArtifactWriter(other) as slow:
        fast = build(other)
        slow.publish(name="another", target="trainable")
    assert verify(other) == fast
    assert sorted(os.listdir(tmp_path)) == ["art", "other"]


def test_something_of_the_users_appears_before_overwriting(tmp_path):
    with (
        pytest.raises(OutputError, match="not a vlmbuild artifact"),
        ArtifactWriter(tmp_path / "art", overwrite=True) as writer,
    ):
        (tmp_path / "art").mkdir()
        (tmp_path / "art/thesis.tex").write_text("x")
        writer.publish(name="m", target="trainable")
    assert (tmp_path / "art/thesis.tex").read_text() == "x"


def test_open_refuses_at_once(tmp_path):
    with ArtifactWriter(tmp_path / "art") as writer:
        writer.write("a", b"", "data")
        with pytest.raises(IntegrityError, match="'../a' is refused"):
            writer.write("../a", b"", "data")
        with pytest.raises(IntegrityError, match="collide"):
            writer.write("A", b"", "data")
        with pytest.raises(IntegrityError, match="role 'other'"):
            writer.write("b", b"", "other")
        with pytest.raises(IntegrityError, match="can run code"):
            writer.write("b.so", b"", "data")
        manifest = writer.publish(name="m", target="t")
    assert [entry.path for entry in manifest.files] == ["a"]


def test_a_file_left_open(tmp_path):
    with ArtifactWriter(tmp_path / "art") as writer:
        file = writer.open("a", "data")
        with pytest.raises(OutputError, match="still open: a. Close them"):
            writer.publish(name="m", target="t")
        file.close()
        file.close()
        with pytest.raises(OutputError, match="is closed. Write before"):
            file.write(b"x")


def test_out_of_order_writes_have_the_right_digest(tmp_path):
    with ArtifactWriter(tmp_path / "art") as writer:
        with writer.open("scattered", "data") as file:
            file.write_at(b"world", 5)
            file.write_at(b"hello", 0)
        writer.write("plain", b"helloworld", "data")
        plain, scattered = writer.publish(name="m", target="t").files
    assert (scattered.digest, scattered.size) == (plain.digest, plain.size)


def test_copy(tmp_path):
    (tmp_path / "source").write_bytes(b"x" * 3_000_000)
    with ArtifactWriter(tmp_path / "art") as writer:
        writer.copy(tmp_path / "source", "tokenizer.json", "processor")
        assert (writer.staging / "tokenizer.json").stat().st_size == 3_000_000
        with pytest.raises(SourceError, match="none cannot be read: No such file"):
            writer.copy(tmp_path / "none", "x", "processor")
        with pytest.raises(SourceError, match="not a regular file"):
            writer.copy(tmp_path, "x", "processor")


def test_a_source_that_cannot_be_read_to_its_end(tmp_path, monkeypatch):
    def broken(descriptor, count):
        raise OSError(5, "Input/output error")

    (tmp_path / "source").write_bytes(b"x")
    monkeypatch.setattr(os, "read", broken)
    with (
        pytest.raises(SourceError, match="source cannot be read: Input/output error"),
        ArtifactWriter(tmp_path / "art") as writer,
    ):
        writer.copy(tmp_path / "source", "x", "processor")


def test_space_is_checked_ahead(tmp_path):
    with ArtifactWriter(tmp_path / "art") as writer:
        writer.require_space(1)
        with pytest.raises(
            OutputError, match=r"1152921504606846976 bytes \(1048576.0 TiB\) are needed and .* are free"
        ):
            writer.require_space(2**60)

"""Staging directories: whose they are, and which may be removed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vlmbuild.artifact import staging
from vlmbuild.artifact.output import check_output
from vlmbuild.errors import OutputError


def test_only_abandoned_ones_of_the_same_output_go(tmp_path, monkeypatch):
    output = tmp_path / "art"
    mine = staging.create_staging(output)
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    pid, start = process.pid, staging._start_time(process.pid)
    process.wait()
    head = f".art.staging-{staging._host()}-{staging._boot()}"
    gone = tmp_path / f"{head}-{pid}-{start}-{'0' * 12}"
    reused = tmp_path / f"{head}-{os.getpid()}-1-{'0' * 12}"  # the process id lives again in another process
    now = staging._start_time(os.getpid())
    rebooted = tmp_path / f".art.staging-{staging._host()}-{'0' * 8}-{os.getpid()}-{now}-{'0' * 12}"
    elsewhere = tmp_path / f".art.staging-{'0' * 8}-{'0' * 8}-{pid}-1-{'0' * 12}"
    other = tmp_path / f"{head.replace('art', 'art2')}-{pid}-{start}-{'0' * 12}"
    users = tmp_path / ".art.staging-notes"
    for path in (gone, reused, rebooted, elsewhere, other, users):
        path.mkdir()
        (path / "file").write_bytes(b"")
    link = tmp_path / f"{head}-{pid}-{start}-{'1' * 12}"
    link.symlink_to(users)
    staging.remove_abandoned(output)
    assert set(tmp_path.iterdir()) == {mine, elsewhere, other, users, link}
    assert list(users.iterdir()) == [users / "file"]


def test_the_name_may_hold_pattern_characters(tmp_path):
    path = staging.create_staging(tmp_path / "a+b(1)")
    assert path.name.startswith(".a+b(1).staging-")
    staging.remove_abandoned(tmp_path / "a+b(1)")
    assert path.exists()


def test_publish_new_never_replaces(tmp_path, monkeypatch):
    targets = [tmp_path / "file", tmp_path / "empty", tmp_path / "link"]
    targets[0].touch()
    targets[1].mkdir()
    targets[2].symlink_to("none")
    for atomic in (True, False):
        if not atomic:
            monkeypatch.setattr(staging, "_renameat2", lambda *arguments: False)
        source = staging.create_staging(tmp_path / "art")
        for target in targets:
            with pytest.raises(FileExistsError):
                staging.publish_new(source, target)
        assert source.exists()


def test_where_the_system_has_no_renameat2(tmp_path, monkeypatch):
    monkeypatch.setattr(staging.ctypes, "CDLL", lambda *arguments, **options: object())
    source = staging.create_staging(tmp_path / "art")
    staging.publish_new(source, tmp_path / "art")
    assert (tmp_path / "art").is_dir()


def test_a_process_that_was_killed_between_two_renames_loses_nothing(tmp_path):
    output = tmp_path / "art"
    script = """
import os, sys
from pathlib import Path
from vlmbuild.artifact import staging
from vlmbuild.artifact.output import check_output
from vlmbuild.errors import OutputError
output, rename = Path(sys.argv[1]), os.rename
output.mkdir()
(output / "old").touch()
made = staging.create_staging(output)
staging._renameat2 = lambda *_: False
os.rename = lambda *names: rename(*names) if names[0] == output else os._exit(9)
staging.publish_exchange(made, output)
"""
    done = subprocess.run([sys.executable, "-c", script, str(output)], check=False)
    assert done.returncode == 9
    assert not output.exists() and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(OutputError, match="is not a vlmbuild artifact"):  # the old one is there again
        check_output(output, overwrite=True)
    assert list(output.iterdir()) == [output / "old"]
    staging.remove_abandoned(output)
    assert list(tmp_path.iterdir()) == [output]


def test_what_a_zombie_left_is_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    start = staging._start_time(process.pid)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has waited for it
    left = tmp_path / f".art.staging-{staging._host()}-{staging._boot()}-{process.pid}-{start}-{'0' * 12}"
    left.mkdir()
    staging.remove_abandoned(tmp_path / "art")
    assert not left.exists()
    process.wait()

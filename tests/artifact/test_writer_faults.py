"""Faults while writing: a failing call, a full disk, a kill or a signal leave the old artifact or the new one."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vlmbuild.artifact import writer as module
from vlmbuild.artifact.reader import verify
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.errors import IntegrityError, OutputError

ROOT = Path(__file__).parents[2]


def build(output, *, data=b"{}", overwrite=False):
    with ArtifactWriter(output, overwrite=overwrite) as writer:
        writer.write("config.json", data, "config")
        writer.write("graph/program.txt", b"one", "graph")
        return writer.publish(name="m", target="trainable", toolchain={"torch": "2"})


def test_a_lying_disk(tmp_path, monkeypatch):
    def settle(folder):
        (folder / "config.json").write_bytes(b"[]")

    monkeypatch.setattr(module, "_settle", settle)
    with pytest.raises(IntegrityError, match="something else than was written to .*nothing was published.*config.json"):
        build(tmp_path / "art")
    assert os.listdir(tmp_path) == []


def test_a_name_that_is_not_confirmed(tmp_path, monkeypatch):
    real = module.sync_directory

    def sync(path):
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        real(path)

    monkeypatch.setattr(module, "sync_directory", sync)
    with pytest.raises(OutputError, match="is complete, but the disk did not confirm its name"):
        build(tmp_path / "art")
    verify(tmp_path / "art")


@pytest.mark.parametrize(
    ("call", "code"),
    [("pwrite", 28), ("fsync", 28), ("open", 28), ("mkdir", 28), ("chmod", 28), ("fchmod", 28), ("fsync", 5)],
)
def test_a_failure_of_the_nth_call(tmp_path, monkeypatch, call, code):
    """Whatever call fails, the error is typed, the old artifact stays, and nothing else is left."""
    old = build(tmp_path / "art")
    real = getattr(os, call)
    failures = 0
    for turn in range(1000):
        count = 0

        def faulty(*arguments, **options):
            nonlocal count
            count += 1
            if count == turn + 1:  # noqa: B023 - called in this turn only
                raise OSError(code, os.strerror(code), None)
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, faulty)
            try:
                build(tmp_path / "art", data=b"[]", overwrite=True)
            except (OutputError, IntegrityError) as error:
                if "is complete" in str(error):  # the very last step
                    break
                failures += 1
                if isinstance(error, OutputError) and code == 28:
                    assert "Free space" in str(error)
            else:
                break
        assert verify(tmp_path / "art") == old
        assert os.listdir(tmp_path) == ["art"]
    assert failures > 0
    # The last open of all is that of removing what was replaced; a later process does that then.
    assert "art" in os.listdir(tmp_path) if call == "open" else os.listdir(tmp_path) == ["art"]


def test_enospc_from_anything_inside(tmp_path):
    with pytest.raises(OutputError, match="No space left on device.*Free space"), ArtifactWriter(tmp_path / "art"):
        raise OSError(28, "No space left on device")


def test_a_file_size_limit(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OutputError, match="File too large.*file size limit"):
            build(tmp_path / "art", data=b"x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


CHILD = """
import os, signal, sys
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.errors import OutputError
"""


def run_child(body, *arguments, prefix=()):
    code = CHILD + textwrap.dedent(body)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*prefix, sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_a_really_full_disk(tmp_path):
    probe = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size=1m none {tmp_path}"]
    try:
        usable = subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        usable = False
    if not usable:
        pytest.skip("mounting a small file system is not possible here; the injected faults cover it")
    body = """
        try:
            with ArtifactWriter(sys.argv[1] + "/art") as writer:
                writer.write("model.safetensors", bytes(2_000_000), "weights")
        except OutputError as error:
            print(error, os.listdir(sys.argv[1]))
    """
    prefix = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$@"', "sh"]
    result = run_child(body, tmp_path, prefix=prefix)
    assert "No space left on device" in result.stdout, result.stderr
    assert result.stdout.endswith("[]\n")


def test_kill_leaves_no_artifact_and_the_next_run_cleans_up(tmp_path):
    body = """
        with ArtifactWriter(sys.argv[1]) as writer:
            writer.write("config.json", b"{}", "config")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_child(body, tmp_path / "art").returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".art.staging-")
    build(tmp_path / "art")
    assert os.listdir(tmp_path) == ["art"]


@pytest.mark.parametrize("call", ["fsync", "rename", "close"])
def test_kill_at_every_step_of_overwriting(tmp_path, call):
    """The output is the old artifact or the new one at every moment, and cleaning leaves nothing else."""
    body = """
        from vlmbuild.artifact import staging
        name = sys.argv[2]
        where = staging if name == "rename" else os
        name = "_renameat2" if name == "rename" else name
        real = getattr(where, name)
        for turn in range(200):
            child = os.fork()
            if child:
                status = os.waitpid(child, 0)[1]
                from vlmbuild.artifact.reader import verify
                print(verify(sys.argv[1]).id, flush=True)
                if status == 0:
                    break
                continue
            count = 0
            def dying(*arguments, **options):
                global count
                count += 1
                if count == turn + 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)
            setattr(where, name, dying)
            with ArtifactWriter(sys.argv[1], overwrite=True) as writer:
                writer.write("config.json", b"[]", "config")
                writer.write("graph/program.txt", b"one", "graph")
                writer.publish(name="m", target="trainable", toolchain={"torch": "2"})
            os._exit(0)
    """
    old = build(tmp_path / "art")
    result = run_child(body, tmp_path / "art", call)
    assert result.returncode == 0, result.stderr
    new = build(tmp_path / "art", data=b"[]", overwrite=True)
    ids = result.stdout.split()
    assert ids[0] == old.id
    assert set(ids) <= {old.id, new.id}
    assert ids[-1] == new.id
    assert os.listdir(tmp_path) == ["art"]


def test_termination_removes_the_staging(tmp_path):
    body = """
        def stop(number, frame):
            raise SystemExit(143)
        signal.signal(signal.SIGTERM, stop)
        with ArtifactWriter(sys.argv[1]) as writer:
            writer.write("config.json", b"{}", "config")
            os.kill(os.getpid(), signal.SIGTERM)
    """
    assert run_child(body, tmp_path / "art").returncode == 143
    assert os.listdir(tmp_path) == []


def test_same_id_from_another_process_folder_seed_and_umask(tmp_path):
    body = """
        os.umask(0o077)
        with ArtifactWriter(sys.argv[1]) as writer:
            writer.write("graph/program.txt", b"one", "graph")
            writer.write("config.json", b"{}", "config")
            print(writer.publish(toolchain={"torch": "2"}, target="trainable", name="m").id)
    """
    (tmp_path / "else/where").mkdir(parents=True)
    first = build(tmp_path / "art")
    environment = ["env", "PYTHONHASHSEED=7", "TZ=Asia/Tokyo", "LC_ALL=C", "HOME=/nonexistent"]
    result = run_child(body, tmp_path / "else/where/other name", prefix=environment)
    assert result.stdout.strip() == first.id, result.stderr

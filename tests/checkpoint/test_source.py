"""Sources: directories, zoo names, hub ids without a network, and what is none of these."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vlmbuild.checkpoint.source import resolve
from vlmbuild.errors import SourceError
from vlmbuild.zoo import ZOO


def test_directory_and_zoo_name(checkpoint):
    assert resolve(checkpoint).uri == "directory"
    assert resolve(checkpoint).directory == checkpoint
    assert resolve("qwen2-vl-digits").uri == "zoo:qwen2-vl-digits"
    assert resolve("qwen2-vl-digits").config()["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert all((directory / "config.json").is_file() for directory in ZOO.values())


@pytest.mark.parametrize("name", ["no-such-thing", "./no/such/dir", "a/b/c", "no such"])
def test_what_is_no_source(name):
    with pytest.raises(SourceError, match="is not a directory, a hub id"):
        resolve(name)


def test_file_is_no_source(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(SourceError, match="is a file. Name the directory"):
        resolve(file)


SCRIPT = """
from vlmbuild.checkpoint.source import resolve
from vlmbuild.errors import SourceError
try:
    resolve("Qwen/Qwen2-VL-2B-Instruct")
except SourceError as error:
    print(error)
"""


def test_hub_without_network(tmp_path):
    environment = {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": ""}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "Qwen/Qwen2-VL-2B-Instruct" in done.stdout
    assert "give its directory" in done.stdout


def test_hub_snapshot_in_the_local_cache_is_used_and_its_commit_is_recorded(tmp_path, monkeypatch, checkpoint):
    import huggingface_hub

    commit = "a" * 40
    snapshot = tmp_path / "models--o--n" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(checkpoint)
    (tmp_path / "models--o--n" / "refs").mkdir()
    (tmp_path / "models--o--n" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = resolve("o/n")
    assert found.uri == f"o/n@{commit}"
    assert found.config()["model_type"] == "qwen2_vl"

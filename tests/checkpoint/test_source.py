"""Sources: directories, zoo names, hub ids without a network, and what is none of these."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from vlmbuild.adapters.peft_files import read_adapter
from vlmbuild.artifact.weights_reader import CheckpointWeights
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


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_pipes_and_huge_files_are_refused_at_once(checkpoint, tmp_path, name):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    os.truncate(source / name, 6 * 2**30)  # sparse
    with pytest.raises(SourceError, match=rf"{name}.* (has|more than) \d+ bytes"):
        resolve(source).config()
    (source / name).unlink()
    os.mkfifo(source / name)
    with pytest.raises(SourceError, match=f"{name} cannot be read: it is not a regular file"):
        resolve(source).config()


def test_weights_that_are_a_pipe(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    (source / "model.safetensors").unlink()
    os.mkfifo(source / "model.safetensors")
    with pytest.raises(SourceError, match="model.safetensors cannot be read: it is not a regular file"):
        CheckpointWeights(source)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_is_a_pipe(tmp_path, name):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(SourceError, match="is not a readable adapter.*not a regular file"):
        read_adapter(tmp_path)


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

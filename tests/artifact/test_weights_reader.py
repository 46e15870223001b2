"""Reading checkpoints: the published names only, complete, never pickled."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from vlmbuild.artifact import weights_reader as checkpoint
from vlmbuild.artifact.weights_reader import INDEX, SINGLE, CheckpointWeights
from vlmbuild.errors import SourceError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.int64), "c": torch.ones(4).bfloat16()}


@pytest.fixture
def sharded(tmp_path):
    safetensors.torch.save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, tmp_path / ONE)
    safetensors.torch.save_file({"c": TENSORS["c"]}, tmp_path / TWO)
    index(tmp_path, {"a": ONE, "b": ONE, "c": TWO})
    return tmp_path


def index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1.5}, "weight_map": weight_map}))


def refused(directory, words):
    with pytest.raises(SourceError, match=words) as caught:
        CheckpointWeights(directory)
    assert str(directory) in str(caught.value)


def same(weights):
    assert set(weights.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = weights.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_single_file(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / SINGLE)
    weights = CheckpointWeights(str(tmp_path))
    same(weights)
    assert weights.files == (tmp_path / SINGLE,)


def test_shards(sharded):
    weights = CheckpointWeights(sharded)
    same(weights)
    assert weights.files == (sharded / ONE, sharded / TWO)


def test_links_of_a_download_cache_are_followed(sharded, tmp_path_factory):
    snapshot = tmp_path_factory.mktemp("snapshot")
    for name in (ONE, TWO, INDEX):
        (snapshot / name).symlink_to(sharded / name)
    same(CheckpointWeights(snapshot))


def test_memory_is_its_own(sharded):
    weights = CheckpointWeights(sharded)
    first = weights.read("a")
    first.zero_()
    assert torch.equal(weights.read("a"), TENSORS["a"])


def test_unknown_tensor(sharded):
    with pytest.raises(SourceError, match="has no tensor 'x', only 3 others. Check that"):
        CheckpointWeights(sharded).read("x")


def test_a_file_that_changes(sharded):
    weights = CheckpointWeights(sharded)
    data = bytearray((sharded / ONE).read_bytes())
    data[-1] ^= 1
    (sharded / ONE).write_bytes(data)
    with pytest.raises(SourceError, match=f"{ONE} changed while it was read"):
        weights.read("a")
    (sharded / ONE).write_bytes(data[:-30])
    with pytest.raises(SourceError, match="changed while it was read"):
        weights.read("b")
    (sharded / ONE).unlink()
    with pytest.raises(SourceError, match=f"{ONE} changed"):
        weights.read("a")


def test_missing_shards_are_named(sharded):
    (sharded / ONE).unlink()
    refused(sharded, f"lacks the shards {ONE} of {INDEX}. Download them")


def test_truncated_shard_is_named(sharded):
    (sharded / TWO).write_bytes((sharded / TWO).read_bytes()[:-1])
    refused(sharded, f"{TWO} is not a valid safetensors file: it is truncated")


def test_index_and_shards_agree(sharded):
    index(sharded, {"a": ONE, "b": ONE, "c": TWO, "d": TWO})
    refused(sharded, f"{TWO} and {INDEX} disagree about d")
    index(sharded, {"a": ONE, "c": TWO})
    refused(sharded, f"{ONE} and {INDEX} disagree about b")
    index(sharded, {"a": ONE, "b": TWO, "c": TWO})
    refused(sharded, "disagree about b")


def test_a_tensor_in_two_shards(sharded):
    safetensors.torch.save_file({"c": TENSORS["c"], "a": TENSORS["a"]}, sharded / TWO)
    refused(sharded, f"{TWO} and {INDEX} disagree about a")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "a\\b", "", 1, None])
def test_index_paths(sharded, shard):
    index(sharded, {"a": shard})
    refused(sharded, f"{INDEX} is not a valid index: The file path")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map":{}}', '{"weight_map":[1]}', '{"weight_map":{"a":"x","a":"y"}}', "[" * 100_000],
)
def test_malformed_index(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, f"{INDEX} is not a valid index: .*Download the checkpoint again")


def test_huge_index(sharded, monkeypatch):
    monkeypatch.setattr(checkpoint, "_MAX_INDEX_BYTES", 10)
    refused(sharded, "larger than 10 bytes")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.pt"]
)
def test_pickle_is_refused_with_a_recipe(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    refused(tmp_path, rf"only as pickle \({name}\), which is refused because loading it runs code.*save_pretrained")


def test_nothing_at_all(tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"")
    refused(tmp_path, f"has no weights: neither {SINGLE} nor {INDEX} is there")
    refused(tmp_path / "none", "is not a folder. Give the folder of a checkpoint")

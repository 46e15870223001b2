"""Weights on their way into an artifact: in pieces, the same however many cores, and nothing left of a build that ends early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from checkpoints import copied, edit_weights, interruptible

from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.builder.build import build
from vlmbuild.errors import DeviceError, SourceError
from vlmbuild.quant.spec import QuantSpec
from vlmbuild.recipe import Recipe
from vlmbuild.targets import weights as transfer
from vlmbuild.util import cpu as cores


@pytest.mark.parametrize("form", ["none", "nf4", "int8"])
def test_pieces_and_cores_do_not_show(form, checkpoint, plain, nf4, tmp_path, monkeypatch):
    recipe = Recipe(quantize=None if form == "none" else QuantSpec(form), dtype="float32")
    whole = {"none": plain, "nf4": nf4}.get(form) or build(checkpoint, tmp_path / "whole", recipe)
    monkeypatch.setattr(transfer, "_CHUNK", 4096)
    monkeypatch.setattr(transfer, "available_cores", lambda: 5)
    pieces = build(checkpoint, tmp_path / "pieces", recipe)
    assert pieces.manifest.id == whole.manifest.id


def test_no_tensor_is_in_memory_as_a_whole(checkpoint, tmp_path, monkeypatch):
    counts = []
    read_part = CheckpointWeights.read_part

    def watched(self, name, first, count):
        counts.append(count)
        return read_part(self, name, first, count)

    monkeypatch.setattr(CheckpointWeights, "read_part", watched)
    monkeypatch.setattr(transfer, "_CHUNK", 4096)
    build(checkpoint, tmp_path / "out", Recipe(quantize=QuantSpec()))
    assert max(counts) == 4096
    assert len(counts) > 100


def test_several_shards_are_what_one_file_is(checkpoint, nf4, tmp_path, monkeypatch):
    one = CheckpointWeights(nf4.path)
    monkeypatch.setattr("vlmbuild.targets.weights.SHARD_BYTES", 2**17)
    many = CheckpointWeights(build(checkpoint, tmp_path / "many", Recipe(quantize=QuantSpec(), dtype="float32")).path)
    assert len(many.files) > 3
    assert one.tensors.keys() == many.tensors.keys()
    for name in one.tensors:
        assert torch.equal(one.read(name).view(torch.uint8), many.read(name).view(torch.uint8)), name


SCRIPT = """
import os, signal, sys
from vlmbuild import QuantSpec, Recipe, build
sent = []
def progress(stage, done, total):
    if stage == "weights" and not sent:  # once, as a user does: a second one while Python ends would decide its exit code
        sent.append(done)
        os.kill(os.getpid(), signal.SIGINT)
build(sys.argv[1], sys.argv[2], Recipe(quantize=QuantSpec()), progress=progress)
"""


@pytest.mark.slow
def test_a_build_that_is_interrupted_leaves_nothing(checkpoint, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(checkpoint), str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=interruptible, check=False)
    assert ended.returncode == -signal.SIGINT, ended.stderr
    assert os.listdir(tmp_path) == []


def test_an_error_in_one_thread_ends_the_build(checkpoint, tmp_path, monkeypatch):
    source = copied(checkpoint, tmp_path / "source")
    edit_weights(source, lambda t: t["model.layers.1.mlp.up_proj.weight"][-1, -1].fill_(float("inf")))
    monkeypatch.setattr("vlmbuild.targets.weights.SHARD_BYTES", 2**16)
    for form in ("nf4", "int8"):
        with pytest.raises(SourceError, match=r"layers.1.mlp.up_proj.weight holds NaN or infinity"):
            build(source, tmp_path / "out", Recipe(quantize=QuantSpec(form)))
    assert os.listdir(tmp_path) == ["source"]


def test_a_weight_beyond_float16_cannot_become_int8(checkpoint, tmp_path):
    source = copied(checkpoint, tmp_path / "source")
    edit_weights(source, lambda t: t["model.layers.1.mlp.up_proj.weight"][0, 0].fill_(70000.0))
    with pytest.raises(SourceError, match=r"layers.1.mlp.up_proj.weight holds values beyond"):
        build(source, tmp_path / "out", Recipe(quantize=QuantSpec("int8")))
    build(source, tmp_path / "out", Recipe(quantize=QuantSpec("int8", skip=("*.layers.1.mlp.up_proj",))))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_quantizing_on_a_gpu_that_is_not_there(checkpoint, tmp_path):
    with pytest.raises(DeviceError, match="Device 'cuda' is not available here"):
        build(checkpoint, tmp_path / "out", device="cuda")
    assert os.listdir(tmp_path) == []


def test_threads_of_torch_are_put_back():
    before = torch.get_num_threads()
    with cores.single_threaded() as start:
        start()
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before

"""Two processes, through torchrun and gloo: losses and trained weights are those of one process on all batches."""

from __future__ import annotations

import distributed
import pytest
import torch
from parity import assert_close
from safetensors.torch import load_file

import vlmbuild
from vlmbuild.errors import UsageError

pytestmark = pytest.mark.slow  # starts processes with torchrun

SAME = 1e-5
"""float32: sums over processes are taken in another order."""


@pytest.fixture(scope="module")
def loops(nf4, tmp_path_factory):
    output = tmp_path_factory.mktemp("loops")
    distributed.torchrun(nf4.path, output, *distributed.LOOPS, "trainer")
    return output


def assert_same_adapter(directory, expected):
    found, wanted = (load_file(path / "adapter_model.safetensors") for path in (directory, expected))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_close(found[name], tensor, SAME, name)


@pytest.mark.parametrize("case", [case for case in distributed.LOOPS if "bfloat16" not in case])
def test_losses_and_weights_are_those_of_one_process(case, loops, nf4, tmp_path):
    model = distributed.adapted(nf4.path)
    expected = distributed.loop(model, distributed.ready(distributed.LOOPS[case][0])[:2])
    assert distributed.record(loops / case)["losses"] == pytest.approx(expected, rel=SAME)
    assert expected[2] < expected[0] - 0.1
    vlmbuild.save_adapter(model, tmp_path)
    assert_same_adapter(loops / case, tmp_path)


def test_mixed_precision_is_close_to_float32(loops):
    found, wanted = (distributed.record(loops / case)["losses"] for case in ("fsdp in bfloat16", "fsdp"))
    assert found == pytest.approx(wanted, rel=0.05)


def test_quantized_weights_are_sharded(loops):
    whole, half = distributed.record(loops / "ddp")["held"], distributed.record(loops / "fsdp")["held"]
    assert half == pytest.approx(whole / 2, rel=0.01)


def test_processes_with_different_kinds_of_batches_are_refused_on_all_of_them(loops):
    for case in ("fsdp", "accelerate fsdp"):
        assert "{'image': [0], 'text': [1]}" in distributed.record(loops / case)["refusal"]


def test_trainer_in_two_processes(loops, nf4, tmp_path):
    expected = distributed.train(nf4.path, tmp_path, 1)
    found = distributed.record(loops / "trainer")
    assert found["losses"] == pytest.approx(expected["losses"], rel=SAME)
    assert found["tokens"] == expected["tokens"]
    assert_same_adapter(loops / "trainer" / "checkpoint-3", tmp_path / "checkpoint-3")


def test_shard_says_what_is_missing(model):
    with pytest.raises(UsageError, match=r"no process group.*torchrun"):
        vlmbuild.shard(model)
    with pytest.raises(UsageError, match=r"Expected a model from vlmbuild\.load that is not wrapped, got Linear"):
        vlmbuild.shard(torch.nn.Linear(2, 2))

"""Which blocks are computed again, where their inputs wait, and that nothing changes."""

from __future__ import annotations

import pytest
import torch
from tiny import BATCHES, make_batch

from vlmbuild.errors import UsageError
from vlmbuild.runtime.torch import checkpointing
from vlmbuild.runtime.torch.checkpointing import Checkpointing


def step(model):
    batch, labels = make_batch(*BATCHES["two grids, right"])
    model.zero_grad()
    loss = model(**batch, labels=labels).loss
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [{"offload": True}, {"every_n_layers": 2, "offload": True}])
def test_loss_and_gradients_stay_the_same(model, options):
    loss, gradients = step(model)
    model.activation_checkpointing_enable(**options)
    again, found = step(model)
    assert torch.equal(loss, again)
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


def test_every_other_block(model, monkeypatch):
    blocks = []
    run = Checkpointing.run
    monkeypatch.setattr(
        Checkpointing, "run", lambda self, block, *a, **k: blocks.append(block) or run(self, block, *a, **k)
    )
    model.activation_checkpointing_enable(every_n_layers=2)
    step(model)
    layers, tower = model.model.language_model.layers, model.model.visual.blocks
    assert blocks == [tower._modules["0"], layers._modules["0"], layers._modules["2"]]


def test_only_the_inputs_of_blocks_are_offloaded(model, monkeypatch):
    """Saved in checkpointing are the tensors that go into a block; on the way to the host no other is."""
    moved = []

    class Recording(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory):
            assert not pin_memory  # the model is on a CPU
            super().__init__(lambda tensor: moved.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor)

    monkeypatch.setattr(checkpointing, "save_on_cpu", Recording)
    model.activation_checkpointing_enable(offload=True)
    step(model)
    hidden = {shape for shape in moved if len(shape) > 1 and shape[-1] in (256, 64)}
    assert {shape[-1] for shape in hidden} == {256, 64}
    assert not any(shape[-1] in (192, 128 * 2 * 3) for shape in moved), "an MLP's or qkv's result was kept"


@pytest.mark.parametrize("options", [{"every_n_layers": 0}, {"every_n_layers": 1.5}])
def test_bad_numbers(model, options):
    with pytest.raises(UsageError, match="every_n_layers"):
        model.activation_checkpointing_enable(**options)


def test_misspelled_options_are_refused(model):
    with pytest.raises(UsageError, match="no option 'every_n_layer'"):
        model.gradient_checkpointing_enable({"every_n_layer": 2})
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": True})


def test_reentrant_checkpointing_is_refused(model):
    with pytest.raises(UsageError, match="use_reentrant=True is not supported"):
        model.gradient_checkpointing_enable({"use_reentrant": True})

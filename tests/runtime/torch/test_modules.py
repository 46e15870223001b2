"""Hooks on a model's modules: they run as on transformers' model, or are refused when they are registered."""

from __future__ import annotations

import pytest
import torch
from parity import MODEL_FP32, assert_close
from tiny import BATCHES, make_batch
from transformers.debug_utils import DebugUnderflowOverflow
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from vlmbuild.errors import UsageError

BATCH, LABELS = make_batch(*BATCHES["two grids, left"])


def loss_and_gradient(model):
    torch.manual_seed(7)
    model.zero_grad(set_to_none=True)
    loss = model(**BATCH, labels=LABELS).loss
    loss.backward()
    return loss.detach(), model.get_input_embeddings().weight.grad.clone()


def test_noise_on_embeddings_is_transformers(model, reference):
    """Embeddings of the same shape as transformers', so that equal seeds give equal noise."""
    plain, _ = loss_and_gradient(model)
    found = []
    for each in (model, reference):
        before = each.training
        each.train()  # noise is added in training alone, and another test may have left the shared reference without it
        handle = activate_neftune(each, 50.0)
        found.append(loss_and_gradient(each))
        deactivate_neftune(each, handle)
        each.train(before)
    assert_close(found[0][0], found[1][0], MODEL_FP32)
    assert_close(found[0][1], found[1][1], MODEL_FP32)
    assert abs(found[0][0] - plain) > 1e-3
    assert torch.equal(loss_and_gradient(model)[0], plain)
    reference.zero_grad(set_to_none=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_hooks_on_the_head_change_loss_and_logits(model, reference, compiled):
    found, shapes = [], []

    def halve(module, inputs, output):
        shapes.append((tuple(inputs[0].shape), tuple(output.shape)))
        return output * 0.5

    for each in (torch.compile(model, backend="eager") if compiled else model, reference):
        with_hook = each.get_output_embeddings().register_forward_hook(halve)
        output = each(**BATCH, labels=LABELS)
        found.append((output.loss.detach(), output.logits.detach()[BATCH["attention_mask"].bool()]))
        with_hook.remove()
    assert_close(found[0][0], found[1][0], MODEL_FP32)
    assert_close(found[0][1], found[1][1], MODEL_FP32)
    assert set(shapes) == {shapes[-1]}


def test_gradients_of_embeddings_are_seen(model, reference):
    seen = []
    for each in (model, reference):
        handle = each.get_input_embeddings().register_full_backward_hook(lambda *event: seen.append(event[2][0]))
        loss_and_gradient(each)
        handle.remove()
    mask = BATCH["attention_mask"].bool()
    assert_close(seen[0][mask], seen[1][mask], MODEL_FP32)
    reference.zero_grad(set_to_none=True)


def test_embeddings_can_require_gradients(model):
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert model(**BATCH).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(**BATCH).logits.requires_grad


def test_generation_calls_them_too(model, reference):
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    found = []
    for each in (model.eval(), reference):
        handles = [
            each.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output * 1.5),
            each.get_output_embeddings().register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 0.5,)),
        ]
        with torch.no_grad():
            found.append(each.eval().generate(**BATCH, **options, return_dict_in_generate=True))
        for handle in handles:
            handle.remove()
    reference.train()
    assert torch.equal(found[0].sequences, found[1].sequences)
    for mine, theirs in zip(found[0].logits, found[1].logits, strict=True):
        assert_close(mine, theirs, MODEL_FP32)


def test_hooks_on_blocks_run(model):
    counted = []
    for path in ("model.language_model.layers.0", "model.visual.blocks.1"):
        model.get_submodule(path).register_forward_hook(lambda *event: counted.append(len(event[2])))
    model(**BATCH)
    assert counted == [1, 1]


@pytest.mark.parametrize(
    "path", ["model.visual", "model.language_model.norm", "model.language_model.layers.0.mlp.up_proj"]
)
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_that_would_never_run_are_refused(model, path, kind):
    with pytest.raises(UsageError, match=r"would never run.*get_input_embeddings\(\)"):
        getattr(model.get_submodule(path), f"register_{kind}")(print)


def test_tools_that_watch_all_modules_are_refused(model):
    with pytest.raises(UsageError, match="would never run"):
        DebugUnderflowOverflow(model)

"""Cross-entropy in pieces: the whole product's value and gradients, in less memory."""

from __future__ import annotations

import pytest
import torch
from parity import EXACT_FP32, assert_close, relative
from torch.nn.functional import cross_entropy, linear

from vlmbuild.runtime.torch import loss as losses
from vlmbuild.runtime.torch.loss import labelled_rows, summed_cross_entropy


def head(tensors, states):
    return linear(states, tensors[0], tensors[1] if len(tensors) > 1 else None)


def case(rows=37, hidden=24, vocabulary=101, dtype=torch.float32, trained=True):
    states = torch.randn(rows, hidden).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden).to(dtype).requires_grad_(trained)
    bias = torch.randn(vocabulary).to(dtype).requires_grad_(trained)
    targets = torch.randint(0, vocabulary, (rows,))
    targets[::5] = -100
    return states, (weight, bias), targets


@pytest.mark.parametrize("pieces", [1, 3, 18])
@pytest.mark.parametrize("trained", [True, False])
def test_value_and_gradients_are_the_whole_products(monkeypatch, pieces, trained):
    states, tensors, targets = case(trained=trained)
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", -(-37 // pieces) * 101)
    leaves = [states, *(tensors if trained else ())]
    ours = summed_cross_entropy(head, tensors, states, targets, 101)
    theirs = cross_entropy(linear(states.double(), *(t.double() for t in tensors)), targets, reduction="sum")
    assert_close(ours, theirs.float(), EXACT_FP32)
    found, expected = (torch.autograd.grad(3 * value / 29, leaves) for value in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other.float(), EXACT_FP32)


def test_bfloat16_is_no_worse_than_the_whole_product():
    states, tensors, targets = case(rows=64, vocabulary=501, dtype=torch.bfloat16)
    wide = [tensor.detach().double().requires_grad_() for tensor in (states, *tensors)]
    exact = torch.autograd.grad(cross_entropy(linear(*wide), targets, reduction="sum"), wide)
    leaves = [states, *tensors]
    ours = torch.autograd.grad(summed_cross_entropy(head, tensors, states, targets, 501), leaves)
    theirs = torch.autograd.grad(cross_entropy(linear(*leaves).float(), targets, reduction="sum"), leaves)
    for mine, their, right in zip(ours, theirs, exact, strict=True):
        assert relative(mine, right) <= 1.05 * relative(their, right)


def test_no_more_logits_than_a_piece_are_there_at_once(monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", 4 * 101)
    states, tensors, targets = case(rows=40)
    seen = []
    summed_cross_entropy(lambda t, s: seen.append(s.shape[1]) or head(t, s), tensors, states, targets, 101)
    assert seen == [4] * 10


def test_without_gradients_nothing_is_kept():
    states, tensors, targets = case()
    with torch.no_grad():
        loss = summed_cross_entropy(head, tensors, states, targets, 101)
    assert loss.grad_fn is None
    assert_close(loss, cross_entropy(linear(states, *tensors), targets, reduction="sum").detach(), EXACT_FP32)


def test_extreme_logits_stay_finite():
    states = torch.tensor([[1e4], [-1e4]]).requires_grad_()
    loss = summed_cross_entropy(head, (torch.tensor([[1.0], [-1.0]]),), states, torch.tensor([1, 0]), 2)
    assert loss.item() == pytest.approx(4e4)
    (gradient,) = torch.autograd.grad(loss, [states])
    assert torch.equal(gradient, torch.tensor([[2.0], [-2.0]]))


def test_rows_that_predict():
    labels = torch.tensor([[-100, 5, 6, -100], [-100, -100, 7, 8]])
    places = torch.tensor([1, 2, 3, 4, 5, 6, 7])  # the first place is padding
    rows, targets = labelled_rows(labels, places)
    assert rows.tolist() == [0, 4, 5] and targets.tolist() == [6, 7, 8]


@pytest.mark.parametrize(("labels", "expected"), [([[-100, -100]], [-100, -100]), ([[-100, 3]], [3, -100])])
def test_there_are_two_rows_at_least(labels, expected):
    rows, targets = labelled_rows(torch.tensor(labels), torch.arange(2))
    assert targets.tolist() == expected and len(rows) == 2


def test_unlabelled_batch_has_no_loss_and_zero_gradients(model):
    from tiny import make_batch

    batch, labels = make_batch([[5, (1, 4, 6), 7]])
    loss = model(**batch, labels=torch.full_like(labels, -100)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for _, p in model.trainable_parameters())

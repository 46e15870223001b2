"""Cross-entropy's kernel against torch in float64, loss and gradient."""

from __future__ import annotations

import pytest
import torch
from exactness import DTYPES, LIMIT, error, near, randn

pytest.importorskip("triton", reason="triton is Linux only")

from vlmbuild.errors import UsageError
from vlmbuild.ops.cross_entropy.triton import cross_entropy_triton
from vlmbuild.runtime.torch import loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocabulary", "shift"), [(7, 0.0), (64, 300.0), (130, 300.0)])
def test_loss_and_gradient(dtype, vocabulary, shift):
    """Rows that are ignored, large logits that would overflow without the maximum, and strided rows."""
    logits = (randn(5, 2 * vocabulary) * 4 + shift).to(dtype)[:, :vocabulary]
    targets = torch.tensor([0, vocabulary - 1, -100, 3, 5], device=logits.device)
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (wanted,) = torch.autograd.grad(losses.sum(), exact)
    for with_gradient in (True, False):
        actual, gradient = cross_entropy_triton(logits, targets, with_gradient=with_gradient)
        near(actual, losses.detach())
        assert actual[2] == 0
    assert gradient is None
    gradient = cross_entropy_triton(logits, targets, with_gradient=True)[1]
    assert gradient.dtype == dtype
    assert gradient[2].eq(0).all()
    near(gradient, wanted)


def test_no_rows_and_wrong_shapes():
    losses, gradient = cross_entropy_triton(randn(0, 9), torch.zeros(0, dtype=torch.int64), with_gradient=True)
    assert losses.shape == (0,)
    assert gradient.shape == (0, 9)
    with pytest.raises(UsageError, match="wanted"):
        cross_entropy_triton(randn(3, 9), torch.zeros(2, dtype=torch.int64), with_gradient=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_the_head_in_pieces(dtype, monkeypatch):
    """The loss of training and its gradients for states and weight, a few rows of logits at a time."""
    monkeypatch.setattr(
        loss, "_kernel", lambda logits: cross_entropy_triton
    )  # the interpreter's tensors are on the CPU
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", 3 * 70)
    leaves = [randn(8, 16, dtype=dtype).requires_grad_(), randn(70, 16, dtype=dtype).requires_grad_()]
    targets = torch.tensor([0, 69, -100, 3, 5, -100, 7, 7], device=leaves[0].device)
    total = loss.summed_cross_entropy(
        lambda head, x: torch.nn.functional.linear(x, head[0]), (leaves[1],), leaves[0], targets, 70
    )
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum")
    assert error(total, wanted) <= LIMIT[dtype]
    for have, want in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(wanted, exact), strict=True):
        near(have, want)

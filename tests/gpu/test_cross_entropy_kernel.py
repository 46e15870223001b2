"""Cross-entropy's kernel against torch in float64, loss and gradient."""

from __future__ import annotations

import pytest
import torch
from exactness import DTYPES, near, randn

pytest.importorskip("triton", reason="triton is Linux only")

from vlmbuild.errors import UsageError
from vlmbuild.ops.cross_entropy_triton import cross_entropy_triton


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [7, 64, 201])
@pytest.mark.parametrize("shift", [0.0, 300.0])
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

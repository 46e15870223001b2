"""LoRA's kernels against float64: result and gradients, ranks that fill no tile or several, matrices in a smaller dtype."""

from __future__ import annotations

import pytest
import torch
from exactness import DEVICE, DTYPES, near, randn

pytest.importorskip("triton", reason="triton is Linux only")

from vlmbuild.ops.lora.op import lora_reference
from vlmbuild.ops.lora.triton import lora_backward_triton, lora_triton


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("small", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "features", "rank"), [(1, (40, 24), 4), (37, (33, 50), 16), (20, (16, 40), 70)])
def test_result_and_gradients(dtype, small, rows, features, rank):
    wide, narrow = features
    base, x, grad = (randn(rows, size, dtype=dtype) for size in (wide, narrow, wide))
    down, up = randn(rank, narrow, dtype=small), randn(wide, rank, dtype=small)
    exact = [tensor.double().requires_grad_() for tensor in (base, x, down, up)]
    result = exact[0] + 0.7 * (exact[1] @ exact[2].T) @ exact[3].T
    near(lora_triton(base, x, down, up, 0.7), result.detach())
    expected = torch.autograd.grad(result, exact[1:], grad.double())
    for one, other in zip(lora_backward_triton(grad, x, down, up, 0.7), expected, strict=True):
        near(one, other)


def test_any_number_of_dimensions_and_strides():
    base, x = randn(2, 3, 24, dtype=torch.float16), randn(3, 2, 40, dtype=torch.float16).transpose(0, 1)
    down, up = randn(40, 8).T, randn(24, 8)
    near(lora_triton(base, x, down, up, 0.5), lora_reference(*(t.float() for t in (base, x, down, up)), 0.5).double())
    grads = lora_backward_triton(base, x, down, up, 0.5)
    assert [tuple(grad.shape) for grad in grads] == [(2, 3, 40), (8, 40), (24, 8)]
    assert torch.equal(grads[1], lora_backward_triton(base, x.contiguous(), down.contiguous(), up, 0.5)[1])


def test_no_rows():
    base, x = (torch.empty(2, 0, size, device=DEVICE) for size in (24, 40))
    down, up = randn(8, 40), randn(24, 8)
    assert lora_triton(base, x, down, up, 0.5).shape == (2, 0, 24)
    gradients = lora_backward_triton(base, x, down, up, 0.5)
    assert gradients[0].shape == (2, 0, 40)
    assert not any(grad.any() for grad in gradients[1:])

"""The LoRA operator: value and gradients against plain torch, dtypes, shapes, torch's own checks."""

from __future__ import annotations

import pytest
import torch
from parity import EXACT_FP32, assert_close

from vlmbuild.errors import UsageError
from vlmbuild.ops.lora.op import lora, lora_reference


def tensors(dtype=torch.float32, tokens=(2, 7), features=(24, 40), r=4):
    out_features, in_features = features
    base = torch.randn(*tokens, out_features).to(dtype)
    values = torch.randn(*tokens, in_features).to(dtype)
    return [
        tensor.requires_grad_() for tensor in (base, values, torch.randn(r, in_features), torch.randn(out_features, r))
    ]


@pytest.mark.parametrize("tokens", [(7,), (2, 7), (1, 1), (3, 0)])
def test_value_and_gradients_are_the_references(tokens):
    inputs = tensors(tokens=tokens)
    ours, theirs = lora(*inputs, 0.7), lora_reference(*inputs, 0.7)
    assert_close(ours, theirs, EXACT_FP32)
    weight = torch.randn_like(ours)
    found, expected = (torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, theirs))
    for name, one, other in zip(("base", "input", "down", "up"), found, expected, strict=True):
        assert_close(one, other, 5 * EXACT_FP32, name)


def test_computes_in_float32_and_rounds_once():
    base, values, down, up = tensors(torch.bfloat16)
    with torch.no_grad():
        exact = (base.double() + 0.5 * (values.double() @ down.double().T @ up.double().T)).float()
        out = lora(base, values, down, up, 0.5)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() <= 2**-8 * exact.abs().max()
    lora(base, values, down, up, 0.5).sum().backward()
    assert (base.grad.dtype, values.grad.dtype, down.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_nothing_but_the_input_and_the_matrices_is_kept():
    saved = []
    inputs = tensors(torch.bfloat16, tokens=(64,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        lora(*inputs, 1.0)
    assert sum(saved) == sum(tensor.nbytes for tensor in inputs[1:])


def test_registration():
    torch.library.opcheck(lora, (*tensors(), 0.3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: torch.ones(4, 39)}, r"down \(4, 39\)"),
        ({0: torch.ones(3, 7, 24)}, r"base \(3, 7, 24\)"),
        ({3: torch.ones(24, 4).bfloat16()}, "bfloat16; pass floats"),
        ({1: torch.ones(2, 7, 40, dtype=torch.float64)}, "float64"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    inputs = tensors()
    for place, tensor in change.items():
        inputs[place] = tensor
    with pytest.raises(UsageError, match=message):
        lora(*inputs, 1.0)

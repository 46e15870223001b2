"""The tolerances of comparisons with transformers: absolute figures, with the reason for each."""

from __future__ import annotations

import torch

# Relative norm of the difference, float32, a whole model forward and backward. The captured graph sums attention in
# another order than transformers; the smallest gradients (key biases, where softmax cancels most of the sum) stay below
# 5e-6, everything else below 2e-6.
MODEL_FP32 = 1e-5

# Relative norm, float32: what an exact pass may change in one region. Only the order of summation differs.
EXACT_FP32 = 1e-6

# A gradient that is nearly nothing, as a share of the norm of all gradients: below it, errors are compared with this share.
CANCELLED = 1e-4

# bfloat16 error against the float32 reference, as a multiple of transformers' own error on the same batches.
BF16_RATIO = 1.1

# Logits of a quantized model against the same graph with the dequantized weights, float32: one product is the same, only
# its order of summation differs.
SAME_WEIGHTS_FP32 = 1e-5


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expected values; absolute where those are all zero."""
    difference = (actual.double() - expected.double()).norm()
    scale = expected.double().norm()
    return (difference / scale if scale > 0 else difference).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "") -> None:
    """Fail unless shapes are equal and the relative norm of the difference is within the tolerance."""
    assert actual.shape == expected.shape, what
    assert torch.isfinite(actual).all(), what
    error = relative(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"

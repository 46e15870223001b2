"""The Triton kernel of cross-entropy: loss and gradient of a row of logits, a tile of the vocabulary at a time.

Logits are read twice, for the log-sum-exp and for the gradient, and nothing but the gradient is written; sums are float32. In
plain torch the same takes a float32 copy and eight passes over it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from vlmbuild.errors import UsageError
from vlmbuild.ops.triton_util import INTERPRET, Launch, require_device

_BLOCK = 64 if INTERPRET else 4096


@triton.jit  # type: ignore[untyped-decorator]
def cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits, targets, losses, gradient, row_stride, vocabulary, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute one row a program; a negative target is ignored: its loss and gradient are zero."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = tl.load(targets + row)
    m_i = tl.full([BLOCK], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK], tl.float32)
    # Every lane keeps its own maximum and sum: one reduction at the end, not one a tile.
    for first in range(0, vocabulary, BLOCK):
        index = first + tl.arange(0, BLOCK)
        value = tl.load(logits + index, mask=index < vocabulary, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m_i, value)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.exp(m_i - base) + tl.exp(value - base)
        m_i = m_new
    highest = tl.max(m_i, 0)
    logsumexp = highest + tl.log(tl.sum(l_i * tl.exp(m_i - highest), 0))
    counted = target >= 0
    chosen = tl.load(logits + tl.where(counted, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(counted, logsumexp - chosen, 0.0))
    if GRADIENT:
        gradient += row * vocabulary
        for first in range(0, vocabulary, BLOCK):
            index = first + tl.arange(0, BLOCK)
            value = tl.load(logits + index, mask=index < vocabulary, other=float("-inf")).to(tl.float32)
            slope = tl.exp(value - logsumexp) - tl.where(index == target, 1.0, 0.0)
            slope = tl.where(counted, slope, 0.0)
            tl.store(gradient + index, slope.to(gradient.dtype.element_ty), mask=index < vocabulary)


def cross_entropy_launch(logits: Tensor, targets: Tensor, losses: Tensor, gradient: Tensor | None) -> Launch:
    """Return the launch of the kernel into `losses` and, unless it is None, `gradient`."""
    rows, vocabulary = logits.shape
    arguments = (logits, targets, losses, losses if gradient is None else gradient, logits.stride(0), vocabulary)
    tile = {"BLOCK": _BLOCK, "num_warps": 8, "num_stages": 2}
    return Launch(cross_entropy_kernel, (rows,), arguments, {"GRADIENT": gradient is not None}, tile)


def cross_entropy_triton(logits: Tensor, targets: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Compute `-log softmax(logits)[target]` of every row, and its gradient for the logits.

    Args:
        logits: `[rows, vocabulary]`, floats of 16 or 32 bits.
        targets: int64 `[rows]`; negative ones are ignored.
        with_gradient: True to compute the gradient.

    Returns:
        float32 `[rows]`, zero where ignored, and `[rows, vocabulary]` in the logits' dtype, or None.

    Raises:
        UsageError: Shapes do not fit.
        DeviceError: The tensors are not where Triton runs.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise UsageError(
            f"cross_entropy: logits {tuple(logits.shape)} and targets {tuple(targets.shape)}; wanted "
            "[rows, vocabulary] and [rows]"
        )
    require_device("cross_entropy", logits)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    losses = logits.new_empty(targets.shape, dtype=torch.float32)
    gradient = logits.new_empty(logits.shape) if with_gradient else None
    if len(logits):
        cross_entropy_launch(logits, targets, losses, gradient).run()
    return losses, gradient


def launches(arguments: tuple[Any, ...], target: int, backward: bool) -> tuple[Launch, ...]:
    """Return the launch for logits and targets."""
    logits, targets = arguments
    losses = logits.new_empty(targets.shape, dtype=torch.float32)
    return (cross_entropy_launch(logits, targets, losses, logits if backward else None),)

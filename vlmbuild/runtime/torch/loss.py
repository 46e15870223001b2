"""Cross-entropy of next tokens without the logits of a batch: only tokens with a label, a few rows of logits at a time.

With V the vocabulary and T the tokens with a label, all logits and their gradient take 2 T V values. Here each chunk's
gradient is computed while its logits exist (as in Cut Cross-Entropy, arXiv:2411.09009, section 4, by rows), so that only the
gradient of the hidden states, T x hidden, outlives the forward pass. The sums are those of the whole product, row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmbuild.ops import tiles

Head = Callable[[tuple[Tensor, ...], Tensor], Tensor]
"""(tensors of the head, hidden states (1, rows, hidden)) -> logits (1, rows, vocabulary)."""

IGNORED = -100
"""Label of a token that the loss ignores."""
_CHUNK_LOGITS = 2**25
"""Logits of a chunk; 64 MiB in bfloat16, twice that in float32."""


def labelled_rows(labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the packed tokens that predict a label, and these labels.

    Args:
        labels: int64 (batch, sequence); -100 is ignored.
        index: int64 (tokens,), the index of each packed token in the flattened batch.

    Returns:
        int64 (rows,) indices of packed tokens, and int64 (rows,) their successors' labels, on the CPU. Padding predicts
        nothing. There are at least two rows, so that a size of one is no special case for a compiler and an unlabelled batch
        still reaches every parameter; added rows have the label -100.
    """
    following = torch.nn.functional.pad(labels.cpu(), (0, 1), value=IGNORED)[:, 1:].flatten()[index]
    rows = (following != IGNORED).nonzero().squeeze(1)
    targets = following[rows]
    if missing := max(0, 2 - len(rows)):
        rows = torch.cat([rows, rows.new_zeros(missing)])
        targets = torch.cat([targets, targets.new_full((missing,), IGNORED)])
    return rows, targets


def summed_cross_entropy(
    head: Head, tensors: tuple[Tensor, ...], hidden: Tensor, targets: Tensor, vocabulary: int
) -> Tensor:
    """Return the sum over rows of -log softmax(head(hidden))[target], in float32.

    Args:
        head: Computes logits; differentiable in its tensors and in the hidden states.
        tensors: The head's tensors.
        hidden: (rows, hidden size), at least two rows.
        targets: int64 (rows,); -100 is ignored.
        vocabulary: Number of logits per row.
    """
    total: Tensor = _ChunkedLoss.apply(head, targets, vocabulary, hidden, *tensors)  # type: ignore[no-untyped-call]
    return total


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients of all chunks, computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, head: Head, targets: Tensor, vocabulary: int, hidden: Tensor, *tensors: Tensor) -> Tensor:
        needs_grad = [tensor.requires_grad for tensor in (hidden, *tensors)]
        leaves = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if needs_grad[0] else None
        of_tensors = [torch.zeros_like(leaf, dtype=torch.float32) if leaf.requires_grad else None for leaf in leaves]
        start = 0
        for rows in _chunk_sizes(len(hidden), vocabulary):
            chunk = slice(start, start + rows)
            states = hidden[None, chunk].detach().requires_grad_(needs_grad[0])
            with torch.set_grad_enabled(any(needs_grad)):
                logits = head(leaves, states)
            loss, gradient = _cross_entropy(logits.detach().squeeze(0), targets[chunk], any(needs_grad))
            total += loss
            if gradient is not None:
                inputs = [tensor for tensor in (states, *leaves) if tensor.requires_grad]
                gradients = iter(torch.autograd.grad(logits, inputs, gradient.unsqueeze(0)))
                if of_hidden is not None:
                    of_hidden[chunk] = next(gradients).squeeze(0)
                for number, total_so_far in enumerate(of_tensors):
                    if total_so_far is not None:
                        of_tensors[number] = total_so_far.add_(next(gradients))
            start += rows
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.save_for_backward(of_hidden, *of_tensors)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, *of_tensors = ctx.saved_tensors
        scaled = [
            None if gradient is None else (gradient * grad).to(dtype)
            for gradient, dtype in zip(of_tensors, ctx.dtypes, strict=True)
        ]
        return None, None, None, None if of_hidden is None else of_hidden * grad.to(of_hidden.dtype), *scaled


def _chunk_sizes(rows: int, vocabulary: int) -> list[int]:
    """Return the rows of each chunk: as equal as possible, at least two."""
    chunks = max(1, min(rows // 2, -(-rows * vocabulary // _CHUNK_LOGITS)))
    return [rows // chunks + (number < rows % chunks) for number in range(chunks)]


def _cross_entropy(logits: Tensor, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss and its gradient by the logits (softmax minus one-hot)."""
    if (kernel := _kernel(logits)) is not None:
        losses, gradient = kernel(logits, targets, with_gradient=with_gradient)
        return losses.sum(), gradient
    values = logits.to(torch.float32, copy=True)
    counted = (targets != IGNORED).unsqueeze(1)
    classes = targets.clamp(min=0).unsqueeze(1)
    values -= values.max(-1, keepdim=True).values
    chosen = values.gather(1, classes)
    sums = values.exp_().sum(-1, keepdim=True)
    loss = ((sums.log() - chosen) * counted).sum()
    if not with_gradient:
        return loss, None
    probabilities = values.div_(sums)
    probabilities.scatter_add_(1, classes, probabilities.new_full(classes.shape, -1.0))
    return loss, probabilities.mul_(counted).to(logits.dtype)


def _kernel(logits: Tensor) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """Return the Triton kernel where it is measured on the GPU of the logits, or None."""
    if not tiles.runs_by_default("cross_entropy", logits):
        return None
    from vlmbuild.ops.cross_entropy.triton import cross_entropy_triton

    return cross_entropy_triton

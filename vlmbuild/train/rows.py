"""Rows of tokens: which of them lie in spans of a text, lengths up to a token, and padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def within(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Tensor:
    """Return bool (tokens,): which tokens lie in one of the spans, whole.

    A token that begins before a response is no label: its first part belongs to the prompt, and the model cannot write the
    rest as this token.
    """
    flags = [any(start <= first < last <= end for start, end in spans) for first, last in offsets]
    return torch.tensor(flags, dtype=torch.bool)


def until_first(flags: Tensor) -> Tensor:
    """Return the length of each row up to its first true value: int64 (rows,)."""
    return flags.int().argmax(1) + 1


def until_last(flags: Tensor) -> Tensor:
    """Return the length of each row up to its last true value: int64 (rows,)."""
    return (flags * torch.arange(1, flags.shape[1] + 1)).amax(1)


def padded_on_the_left(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Move the padding of rows (batch, sequence, ...) from right to left."""
    width = values.shape[1]
    moved = torch.stack([row.roll(width - length, 0) for row, length in zip(values, lengths, strict=True)])
    if values.ndim > 2:  # which images a token sees: padding before all images sees none
        for row, length in zip(moved, lengths, strict=True):
            row[: width - length] = 0
    return moved

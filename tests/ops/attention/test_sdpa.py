"""Calls of torch's kernels: no more pairs of queries and keys than are visible, and no square masks."""

from __future__ import annotations

import pytest
import torch
from exactness import lookahead
from torch.utils._python_dispatch import TorchDispatchMode

from vlmbuild.errors import UsageError
from vlmbuild.ops.attention.op import Masks
from vlmbuild.ops.attention.sdpa import ROWS, _calls, runs, sdpa_backward, sdpa_forward

SCALE = 0.3


class Count(TorchDispatchMode):
    """Counts the pairs of a query and a key that torch's kernels compute, and notes the largest tensor."""

    pairs = numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else (out,)
        self.numel = max([self.numel, *(x.numel() for x in tensors if isinstance(x, torch.Tensor))])
        if "flash_attention" in str(func):
            first = 1 if "backward" in str(func) else 0  # after the gradient
            query, key = args[first : first + 2]
            self.pairs += query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
        return out


def work(length, masks, causal):
    """The pairs of forward and backward on one packed row of one head, and the elements of the largest tensor."""
    query, key, value = torch.randn(3, 1, 1, length, 8).unbind(0)
    with Count() as forward:
        out, logsumexp = sdpa_forward(query, key, value, masks, causal, SCALE)
    with Count() as backward:
        sdpa_backward(out, query, key, value, masks, out, logsumexp, causal, SCALE)
    assert forward.pairs == backward.pairs
    return forward.pairs, max(forward.numel, backward.numel)


def test_packed_segments_never_make_a_dense_mask():
    pairs, largest = work(128, Masks(cu_seqlens=torch.arange(0, 129, 8)), False)
    assert (pairs, largest) == (128 * 8, 128 * 8)


@pytest.mark.parametrize("packed", [False, True])
def test_work_grows_with_what_is_visible(packed):
    """A window of 100 keys over longer and longer rows: as many pairs a row, and no mask but of rows that attend at a time."""
    window = 100
    for length in (1024, 2048, 8192):
        bounds = torch.tensor([0, length]) if packed else None
        pairs, largest = work(length, Masks(cu_seqlens=bounds, window=window), True)
        assert pairs <= length * (window + ROWS)
        assert largest <= max(length * 8, ROWS * (window + ROWS))


def test_blocks_make_no_square_mask():
    length = 1024
    masks = Masks(cu_seqlens=torch.tensor([0, length]), lookahead=lookahead(length, ((200, 700),)))
    pairs, largest = work(length, masks, True)
    assert pairs < 0.75 * length**2
    assert largest <= ROWS * length


def test_what_masks_nothing_costs_nothing():
    """Text alone has no blocks, and a prompt shorter than the window is plainly causal: one call without a mask."""
    masks = Masks(torch.ones(1, 300).long(), lookahead=torch.zeros(1, 300).int(), window=300)
    query = torch.randn(1, 1, 300, 8)
    (call,) = _calls(query, query, masks, True)
    assert call == (None, None, None, None, True)
    step = query[:, :, :1]
    (call,) = _calls(step, query, Masks(lookahead=torch.zeros(1, 1).int(), window=20), True)
    assert call == (None, None, slice(280, 300), None, False)


def test_runs_join_equal_neighbours():
    assert runs(torch.tensor([0, 4, 8, 8, 11, 15, 15]), 20) == [(0, 4, 2), (8, 3, 1), (11, 4, 1)]
    assert runs(torch.tensor([0, 0]), 3) == []
    for bounds in ([0, 5, 3], [0, 9], [-1, 3]):
        with pytest.raises(UsageError, match="must rise"):
            runs(torch.tensor(bounds), 8)

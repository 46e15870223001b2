"""A block whose attention has a window and blocks of tokens, with a cache and without, on the same samples."""

from __future__ import annotations

import pytest
import torch
from exactness import lookahead

from vlmbuild.ir.program import Region
from vlmbuild.kv_cache.block import cached_block

HEADS, DIM, SCALE = 2, 4, 0.5
LENGTHS, LONGEST = (5, 9, 7), 9
BLOCKS = ((1, 4),), ((2, 8),), ()
"""Tokens of each sample; one sample is longer than the window."""


class Block(torch.nn.Module):
    def __init__(self, window):
        super().__init__()
        self.window = window

    def forward(self, states, cu_seqlens, ahead):
        query, key, value = states.unflatten(2, (HEADS, -1)).transpose(1, 2).split(DIM, 3)
        masks = (None, cu_seqlens, None, None)
        attend = torch.ops.vlmbuild.attention
        return (attend(query, key, value, *masks, True, SCALE, ahead.unsqueeze(0), self.window).neg(),)


def block(window):
    tokens, samples = torch.export.Dim("tokens"), torch.export.Dim("samples")
    example = (
        torch.empty(1, 21, 3 * HEADS * DIM),
        torch.empty(4, dtype=torch.int32),
        torch.empty(21, dtype=torch.int32),
    )
    shapes = ({1: tokens}, {0: samples}, {0: tokens})
    traced = torch.export.export(Block(window), example, dynamic_shapes=shapes, strict=False)
    activations = ((1, 21, 3 * HEADS * DIM), (4,), (21,))
    return Region("blocks", traced.graph_module, (), ("blocks.0",), activations)


@pytest.fixture(scope="module")
def samples():
    """Packed states, the padded ones on the left, the mask, and the index of each token in these."""
    padded = torch.randn(3, LONGEST, 3 * HEADS * DIM)
    mask = torch.stack([torch.arange(LONGEST) >= LONGEST - length for length in LENGTHS]).long()
    return padded, mask, mask.flatten().nonzero().squeeze(1)


def ahead_of():
    return torch.cat([lookahead(length, own)[0] for length, own in zip(LENGTHS, BLOCKS, strict=True)])


@pytest.mark.parametrize("window", [None, 4])
def test_a_prompt_with_a_dynamic_cache(window, samples):
    padded, mask, index = samples
    region = block(window)
    bounds, ahead = torch.tensor([0, *LENGTHS]).cumsum(0), ahead_of()
    (expected,) = region.graph(padded.flatten(0, 1)[index][None], bounds.int(), ahead)
    wide = torch.zeros(mask.numel(), dtype=torch.int32).index_copy(0, index, ahead)
    past = torch.zeros(3, HEADS, 0, DIM)
    found, *_ = cached_block(region, "dynamic").region.graph(padded.flatten(0, 1)[None], mask, wide, past, past)
    torch.testing.assert_close(found[0, index], expected[0])


@pytest.mark.parametrize("form", ["dynamic", "static"])
@pytest.mark.parametrize("window", [None, 4])
def test_steps(form, window, samples):
    """The last tokens one by one, after a prompt that fills the rest of the cache."""
    padded, mask, index = samples
    region = block(window)
    bounds, ahead = torch.tensor([0, *LENGTHS]).cumsum(0), torch.zeros(sum(LENGTHS), dtype=torch.int32)
    (expected,) = region.graph(padded.flatten(0, 1)[index][None], bounds.int(), ahead)
    expected = torch.zeros(mask.numel(), HEADS, DIM).index_copy(0, index, expected[0]).unflatten(0, mask.shape)
    _, keys, values = (x.contiguous() for x in padded.unflatten(2, (HEADS, -1)).transpose(1, 2).split(DIM, 3))
    graph = cached_block(region, form).region.graph
    none = torch.zeros(3, dtype=torch.int32)
    for step in range(LONGEST - 4, LONGEST):
        states = padded[:, step][None]
        if form == "dynamic":
            found, key, _ = graph(states, mask[:, : step + 1], none, keys[:, :, :step], values[:, :, :step])
            torch.testing.assert_close(key, keys[:, :, : step + 1])
        else:
            room = [torch.nn.functional.pad(x[:, :, :step], (0, 0, 0, 4)).contiguous() for x in (keys, values)]
            written = torch.nn.functional.pad(mask[:, : step + 1], (0, room[0].shape[2] - step - 1))
            found = graph(states, written, none, *room, torch.tensor([step]))[0]
        torch.testing.assert_close(found[0], expected[:, step])

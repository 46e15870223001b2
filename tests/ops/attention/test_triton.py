"""Ranges of keys and rows, and bits of groups, against the dense mask that the same arguments mean."""

from __future__ import annotations

import pytest
import torch
from exactness import lookahead

pytest.importorskip("triton", reason="triton is Linux only")

from vlmbuild.ops.attention.op import Masks, allowed_keys
from vlmbuild.ops.attention.triton import mask_ranges, split_lanes


@pytest.mark.parametrize("bounds", [[0, 3, 20, 20, 21, 35], [0, 0], [0, 40], [0, *range(1, 41)], [0, 7, 7, 7]])
def test_segments(bounds):
    masks = Masks(cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    ranges = mask_ranges(masks, torch.empty(1, 1, 40, 8), 40)
    check(ranges.row_keys, allowed_keys(40, 40, masks, False, torch.device("cpu"))[0, 0])
    assert ranges.key_rows is ranges.row_keys


@pytest.mark.parametrize("groups", [3, 32, 33, 70])
def test_groups(groups):
    key_groups = torch.randint(groups, (50,), dtype=torch.int32)
    visible = torch.rand(140, groups) > 0.8
    visible[5:9] = False
    visible[:, groups - 1] = torch.arange(140) == 130
    masks = Masks(None, None, key_groups, visible)
    ranges = mask_ranges(masks, torch.empty(1, 1, 140, 8), 50)
    unpacked = (ranges.bits[:, :, None] >> torch.arange(32)) & 1
    assert (ranges.bits.dtype, ranges.words) == (torch.int32, -(-groups // 32))
    assert torch.equal(unpacked.transpose(0, 1).reshape(140, -1)[:, :groups], visible.int())
    of_group = torch.zeros(groups, 50, dtype=torch.bool)
    of_group[key_groups.long(), torch.arange(50)] = True
    check(ranges.row_keys, allowed_keys(140, 50, masks, False, torch.device("cpu"))[0, 0])
    check([ends[:groups] for ends in ranges.group_keys], of_group)
    check([ends[:groups] for ends in ranges.key_rows], visible.T)


@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize(("bounds", "keys"), [([0, 3, 20, 20, 21, 35], 40), (None, 40), (None, 47), (None, 31)])
@pytest.mark.parametrize("blocks", [(), ((4, 14), (22, 31))])
def test_windows_and_blocks(window, bounds, keys, blocks):
    if window is None and not blocks:
        return  # causal order is the kernels' own
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    masks = Masks(None, cu_seqlens, lookahead=lookahead(40, blocks) if blocks else None, window=window)
    ranges = mask_ranges(masks, torch.empty(1, 1, 40, 8), keys)
    seen = allowed_keys(40, keys, masks, True, torch.device("cpu"))[0, 0]
    check([bound.clamp(0, keys) for bound in ranges.row_keys], seen)
    check(ranges.key_rows, seen.T)


def check(found, seen):
    """Return the first and last-plus-one position that each row of a mask sees; an empty range where there is none."""
    assert {ends.dtype for ends in found} == {torch.int32}
    for first, last, row in zip(*(ends.tolist() for ends in found), seen, strict=True):
        where = row.nonzero().flatten().tolist()
        assert (first, last) == (where[0], where[-1] + 1) if where else first >= last


@pytest.mark.parametrize(
    ("dim", "parts"),
    [
        (8, (16, 0)),
        (24, (32, 0)),
        (40, (32, 16)),
        (64, (64, 0)),
        (72, (64, 16)),
        (80, (64, 16)),
        (96, (64, 32)),
        (112, (128, 0)),
    ],
)
def test_lanes_are_split_with_little_padding(dim, parts):
    assert split_lanes(dim) == parts

"""Ranges of keys and rows, and bits of groups, against the dense mask that the same arguments mean."""

from __future__ import annotations

import pytest
import torch
from exactness import DEVICE

pytest.importorskip("triton", reason="triton is Linux only")

from vlmbuild.ops.attention.op import Masks, allowed_keys, row_ranges
from vlmbuild.ops.attention.triton_ranges import groups_launches, int32, segments_launch


@pytest.mark.parametrize("bounds", [[0, 3, 20, 20, 21, 135], [0, 0], [0, 140], [0, *range(1, 141)], [0, 7, 7, 7]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_segments(bounds, dtype):
    cu_seqlens = torch.tensor(bounds, dtype=dtype, device=DEVICE)
    starts, ends = int32(cu_seqlens, 140), int32(cu_seqlens, 140)
    segments_launch(cu_seqlens, starts, ends).run()
    for have, want in zip((starts, ends), row_ranges(cu_seqlens, 140), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("groups", [3, 32, 33, 70])
def test_groups(groups):
    generator = torch.Generator().manual_seed(groups)
    key_groups = torch.randint(groups, (50,), generator=generator, dtype=torch.int32).to(DEVICE)
    visible = (torch.rand(140, groups, generator=generator) > 0.8).to(DEVICE)
    visible[5:9] = False
    visible[:, groups - 1] = torch.arange(140, device=DEVICE) == 130
    words = -(-groups // 32)
    spans, bits, of_rows = int32(visible, 4, 32 * words), int32(visible, words, 140), int32(visible, 2, 140)
    for launch in groups_launches(key_groups, visible.view(torch.uint8), spans, bits, of_rows):
        launch.run()
    unpacked = (bits[:, :, None] >> torch.arange(32, device=DEVICE)) & 1
    assert torch.equal(unpacked.transpose(0, 1).reshape(140, -1)[:, :groups], visible.int())
    dense = allowed_keys(140, 50, Masks(None, None, key_groups, visible), False, visible.device)[0, 0]
    of_group = torch.zeros(groups, 50, dtype=torch.bool, device=DEVICE)
    of_group[key_groups.long(), torch.arange(50, device=DEVICE)] = True
    check(of_rows, dense)
    check(spans[:2, :groups], of_group)
    check(spans[2:, :groups], visible.T)


def check(found, seen):  # type: ignore[no-untyped-def]
    """First and last-plus-one place that is seen, of every row of a mask; a first behind the last where there is none."""
    for first, last, row in zip(*found.tolist(), seen, strict=True):
        where = row.nonzero().flatten().tolist()
        assert (first, last) == (where[0], where[-1] + 1) if where else first >= last

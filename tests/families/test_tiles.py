"""Tiles that lie side by side in a text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmbuild.errors import BatchError
from vlmbuild.families.batch import read_tokens
from vlmbuild.families.grid import feature_index
from vlmbuild.families.tiles import Tile


def number(ids):
    tiles = [Tile("image", index, (1, 2, 2), np.arange(4)) for index in range(3)]
    return feature_index(read_tokens({"input_ids": ids}, {9: "image"}, 10), tiles, {9: "image"}, "remedy")


def test_tokens_of_tiles_may_adjoin():
    ids = torch.tensor([[1, *[9] * 8, 2], [3, *[9] * 4, 4, 5, 6, 7, 8]])
    index = [-1, *range(8), -1, -1, *range(8, 12), *[-1] * 5]
    assert number(ids)[0].tolist() == index


@pytest.mark.parametrize(
    ("first", "second", "message"), [(9, 3, "Sample 0: tile 2 .* 4 .* 1 "), (7, 5, "Sample 0: tile 1 .* 3 ")]
)
def test_tokens_that_are_no_whole_tiles_are_refused(first, second, message):
    with pytest.raises(BatchError, match=message):
        number(torch.tensor([[9] * first + [1] * (12 - first), [9] * second + [1] * (12 - second)]))

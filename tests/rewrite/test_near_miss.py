"""Reports of sites that almost match a pattern."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlmbuild.rewrite.near_miss import near_miss
from vlmbuild.rewrite.pattern import Rewrite, trace

X = torch.empty(4, 8, device="meta")


def pattern(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat((x.neg(), y * 2.0), dim=-1).relu() + x.repeat(1, 2)


REWRITE = Rewrite(pattern, pattern, (X, X), ({}, {}))


def said(function) -> str | None:
    return near_miss(trace(function, (X, X), ({}, {})), [REWRITE])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, y: torch.cat((x.neg(), y * 2.0, y), dim=-1).relu()[:, :8] + x, None),
        (lambda x, y: torch.cat((x.neg(), y * 3.0), dim=-1).relu() + x.repeat(1, 2), "`mul` has the numbers [3.0]"),
        (lambda x, y: torch.cat((x.cos(), y * 2.0), dim=-1).relu() + y.repeat(1, 2), "`cos`"),
        (lambda x, y: x.sigmoid() + y, None),
        (lambda x, y: x.sigmoid(), None),
    ],
)
def test_the_first_difference(function, reason):
    found = said(function)
    assert (found is None) if reason is None else reason in found


def test_a_match_is_no_miss():
    assert said(lambda x, y: torch.cat((x.neg(), y * 2.0), dim=-1).relu() + x.repeat(1, 2)) is None

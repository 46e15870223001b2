"""Ranges of a config's numbers, where a family has lists of them."""

from __future__ import annotations

import pytest

from vlmbuild.errors import SourceError
from vlmbuild.families.config_checks import check_values


def test_lists_are_for_families_that_have_them():
    for sides in ([14, 14], (14, 14)):
        check_values({"patch_size": sides}, lists=("patch_size",))
        with pytest.raises(SourceError, match="patch_size"):
            check_values({"patch_size": sides})


@pytest.mark.parametrize("sides", [[14, 0], (14, 0), [14, "14"], [1] * 5000])
def test_numbers_in_lists_have_ranges(sides):
    with pytest.raises(SourceError, match="patch_size"):
        check_values({"patch_size": sides}, lists=("patch_size",))

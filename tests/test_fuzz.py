"""Changed files are refused with vlmbuild's own errors; `python -m tests.bench.fuzz` tries more of them."""

from __future__ import annotations

import contextlib
import warnings

import pytest

from tests.bench.fuzz import PARSERS, fuzz

CASES = {"lock": 200, "recipe": 600, "manifest": 600, "program": 500, "code": 600, "config": 300}
"""Few seconds together."""


@pytest.mark.parametrize("name", PARSERS)
def test_errors_are_vlmbuilds_own(name):
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        findings = [finding.error for finding in fuzz(name, 1, CASES[name])]
    assert not findings

"""Changed files are refused with vlmbuild's own errors; `python -m tests.bench.fuzz` tries more of them."""

from __future__ import annotations

import contextlib
import json
import warnings

import pytest

from tests.bench.fuzz import fuzz
from tests.bench.fuzz_parsers import PARSERS
from vlmbuild.artifact.canonical import canonical_json
from vlmbuild.errors import IncompatibleError

CASES = {"lock": 200, "recipe": 600, "manifest": 600, "program": 500, "code": 600, "config": 300, "tensors": 400}
CASES |= {"index": 300, "adapter": 300, "quant_state": 500}
"""Few seconds together."""


@pytest.mark.parametrize("name", PARSERS)
def test_errors_are_vlmbuilds_own(name):
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", SyntaxWarning)
        findings = [finding.error for finding in fuzz(name, 1, CASES[name])]
    assert not findings


def test_a_program_whose_code_is_no_syntax(tmp_path):
    """`1[0]` is a warning of the compiler, and an error in a process that takes warnings for errors."""
    parser = PARSERS["program"][1]
    program = json.loads(parser.seeds()[0])
    program["regions"][0]["nodes"][0] = {"op": "getitem", "args": [1, 0]}
    (tmp_path / "program.json").write_bytes(canonical_json(program))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(IncompatibleError, match="SyntaxError"):
            parser.read(tmp_path / "program.json")

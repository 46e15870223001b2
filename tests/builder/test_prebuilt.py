"""The artifacts under version control open, answer, and are what the code builds today."""

from __future__ import annotations

import pytest
from checkpoints import NAMES
from make_prebuilt import PREBUILT, ROLES

from vlmbuild import QuantSpec, load, verify
from vlmbuild.demo.digits import Digits
from vlmbuild.demo.task import READ, exact_match
from vlmbuild.zoo import ZOO


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_a_build_makes_and_reads_digits(name, zoo_artifact):
    path = PREBUILT / f"{name}-nf4"
    stored, built = verify(path), zoo_artifact(name, quantize=QuantSpec("nf4", roles=ROLES)).manifest
    if stored.toolchain == built.toolchain:
        assert stored.id == built.id, "If the change is meant, run tests/helpers/make_prebuilt.py."
    model, processor = load(path, expected_id=stored.id)
    assert exact_match(model, processor, READ, Digits("held_out", 11).take(100)) >= 0.9


def test_every_folder_belongs_to_the_zoo():
    assert {folder.name for folder in PREBUILT.iterdir()} == {f"{name}-nf4" for name in ZOO}

"""Which layers are quantized: roles, patterns, formats of the source, and what contradicts them."""

from __future__ import annotations

import pytest
import tiny

from vlmbuild.errors import SourceError, UsageError
from vlmbuild.quant.decide import decide
from vlmbuild.quant.int8 import Int8
from vlmbuild.quant.nf4 import FP4, NF4
from vlmbuild.quant.spec import Override, QuantSpec

LAYER = "blocks.0.proj"


@pytest.fixture(scope="module")
def linear():
    return tiny.region_program(tiny.linear_region())


def test_formats_come_from_patterns_then_the_role_then_the_source(linear):
    other = "blocks.1.proj"
    assert {d.format for d in decide(linear, QuantSpec()).values()} == {NF4()}
    assert {d.format for d in decide(linear, QuantSpec(roles=("vision",))).values()} == {None}
    assert {d.format for d in decide(linear, None, stored={LAYER: FP4()}).values()} == {FP4(), None}
    assert decide(linear, QuantSpec("none"), stored={LAYER: FP4()})[LAYER].format is None
    found = decide(linear, QuantSpec(skip=(LAYER,), overrides=(Override("*.proj", "int8"),)))
    assert (found[LAYER].format, found[LAYER].reason) == (None, "in the skip list")
    assert (found[other].format, found[other].pinned) == (Int8(), True)
    assert decide(linear, QuantSpec(skip=("published",)), published=lambda m: "published" if m == LAYER else m)[
        LAYER
    ].reason


@pytest.mark.parametrize(
    "spec", [QuantSpec("fp4"), QuantSpec("int8"), QuantSpec(blocksize=128), QuantSpec("auto", budget=5, blocksize=128)]
)
def test_another_format_on_top_is_refused(linear, spec):
    with pytest.raises(SourceError, match=r"blocks.0.proj.*quantized already \(nf4.*--quantize none"):
        decide(linear, spec, stored={LAYER: NF4()})
    assert decide(linear, QuantSpec(), stored={LAYER: NF4()})[LAYER].format == NF4()


@pytest.mark.parametrize("spec", [QuantSpec(skip=("*.k_proj",)), QuantSpec(overrides=(Override("*.k_proj", "fp4"),))])
def test_a_pattern_that_matches_nothing_is_refused(linear, spec):
    with pytest.raises(UsageError, match=r"k_proj.*blocks\.0\.proj"):
        decide(linear, spec)

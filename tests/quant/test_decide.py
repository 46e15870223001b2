"""Which layers are quantized: roles, patterns, formats of the source, and what contradicts them."""

from __future__ import annotations

import pytest
import tiny
import torch

from vlmbuild.errors import SourceError, UsageError
from vlmbuild.ir.program import COMPUTE_DTYPE, Slot
from vlmbuild.quant.decide import decide
from vlmbuild.quant.int4 import Int4
from vlmbuild.quant.int8 import Int8
from vlmbuild.quant.nf4 import FP4, NF4
from vlmbuild.quant.spec import Override, QuantSpec

LAYER = "blocks.0.proj"
TABLE, HEAD = "model.embed_tokens", "lm_head"


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


def with_embeddings(tied=True):
    """Make a program of token embeddings and a head."""
    table = Slot(f"{TABLE}.weight", (40, 64), COMPUTE_DTYPE, "parameter", "embedding")
    head = Slot(f"{HEAD}.weight", (40, 64), COMPUTE_DTYPE, "parameter", "head")

    def embed(weight, x):
        return (torch.nn.functional.embedding(x.argmax(-1), weight),)

    def logits(weight, x):
        return (torch.nn.functional.linear(x, weight),)

    rows = [("1", "tokens", 64)]
    return tiny.region_program(
        tiny.make_region("embed", embed, [table], rows, ("",)),
        tiny.make_region("head", logits, [table if tied else head], rows, ("",)),
    )


def test_a_tied_head_and_the_embeddings_have_one_format():
    tied = with_embeddings()
    found = decide(tied, QuantSpec("int4"))
    assert {module: (d.format, d.lookups) for module, d in found.items()} == {TABLE: (Int8(), True)}
    assert decide(tied, QuantSpec("int4", roles=("embedding", "head")))[TABLE].format == Int4()
    for roles, word in {
        ("language",): "elsewhere",
        ("head",): "embeddings",
        ("embedding",): "head",
        ("embedding=int8", "head"): "head",
    }.items():
        decision = decide(tied, QuantSpec("int4", roles=roles))[TABLE]
        assert decision.format is None and word in decision.reason, roles
    override = Override("*.embed_tokens", "int8")
    assert decide(tied, QuantSpec("int4", roles=("embedding",), overrides=(override,)))[TABLE].format == Int8()
    assert decide(tied, QuantSpec("int4", skip=("*.embed_tokens",)))[TABLE].reason == "in the skip list"


def test_embeddings_with_a_head_of_its_own():
    untied = with_embeddings(tied=False)
    assert {module: d.format for module, d in decide(untied, QuantSpec("int4")).items()} == {
        HEAD: Int8(),
        TABLE: Int8(),
    }
    found = decide(untied, QuantSpec("int4", roles=("embedding",)))
    assert (found[TABLE].format, found[HEAD].format) == (Int4(), None)
    assert set(decide(untied, QuantSpec("int4", roles=("head",)))) == {HEAD}  # embeddings were not asked for


def test_embeddings_keep_their_dtype_without_a_form_for_lookups():
    decision = decide(with_embeddings(), QuantSpec("nf4", roles=("embedding", "head")))[TABLE]
    assert decision.format is None and "nf4" in decision.reason

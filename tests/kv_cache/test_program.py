"""The program with a cache: its interface, that it can be stored, printed and checked, and what it leaves alone."""

from __future__ import annotations

import copy
import json

import matrix
import pytest
import torch

from vlmbuild.errors import IncompatibleError, PassError
from vlmbuild.ir.dims import parse_shape, shape_json
from vlmbuild.ir.printer import digest, program_text
from vlmbuild.ir.program import COMPUTE_DTYPE, join
from vlmbuild.ir.serialize import OPERATORS, from_json, to_json
from vlmbuild.kv_cache.program import STEP, cached_inputs, present_name, with_cache


@pytest.fixture(scope="module", params=matrix.kinds())
def setup(request):
    return matrix.tiny(request.param)


@pytest.fixture(scope="module")
def traced(setup):
    return matrix.program(setup)


@pytest.fixture
def language(setup):
    return setup.family.language_prefix.removeprefix("model.")


@pytest.fixture(scope="module")
def dynamic(traced):
    return with_cache(traced)


@pytest.fixture(scope="module")
def static(traced):
    return with_cache(traced, "static")


def shapes(variant):
    return {entry.name: tuple(shape_json(entry.shape)) for entry in variant.inputs}


def test_the_interface_is_explicit(setup, dynamic):
    text = setup.config().text_config
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cross = set(getattr(text, "cross_attention_layers", ()))
    blocks = [number for number in range(text.num_hidden_layers) if number not in cross]
    for variant in dynamic.variants.values():
        past = [f"past_key_values.{number}.{kind}" for number in blocks for kind in ("key", "value")]
        found = shapes(variant)
        assert [entry.name for entry in cached_inputs(variant)] == past
        assert {found[name] for name in past} == {("batch", text.num_key_value_heads, "past", dim)}
        assert {entry.dtype for entry in cached_inputs(variant)} == {COMPUTE_DTYPE}
        assert found["attention_mask"] == ("batch", "past + new")
        assert found["input_ids"] == (1, "batch*new") and found["position_ids"][-2:] == (1, "batch*new")
        assert "text_cu_seqlens" not in found
        assert list(variant.presents[: len(past)]) == [present_name(name) for name in past]
    assert (STEP in dynamic.variants) == bool(cross)
    if cross:
        kinds = [f"cross_key_values.{number}.{kind}" for number in sorted(cross) for kind in ("key", "value")]
        assert list(dynamic.variants["image"].presents[-len(kinds) :]) == kinds
        assert set(kinds) <= shapes(dynamic.variants[STEP]).keys()
        assert "pixel_values" not in shapes(dynamic.variants[STEP])


def test_static_has_buffers_and_steps_of_one_token(static, dynamic):
    assert set(static.variants) == {"text", STEP} & {"text", *dynamic.variants}
    for variant in static.variants.values():
        found = shapes(variant)
        assert found["input_ids"] == (1, "batch") and found["cache_position"] == (1,)
        assert found["attention_mask"] == ("batch", "length")
        assert all(entry.shape[::2] == parse_shape(("batch", "length")) for entry in cached_inputs(variant))
        assert variant.presents == ()


def test_it_is_stored_printed_and_read_again(traced, dynamic):
    stored = json.loads(json.dumps(to_json(dynamic)))
    again = from_json(stored)
    assert to_json(again) == stored
    text = program_text(dynamic)
    assert "present.0.key" in text and "past + new" in text
    loaded = with_cache(from_json(json.loads(json.dumps(to_json(traced)))))  # has no shapes before
    assert to_json(loaded) == stored


def test_what_writes_into_its_inputs_is_derived_and_never_stored(static):
    with pytest.raises(IncompatibleError, match=r"aten\.(type_as|index_copy_)"):
        to_json(static)
    assert "aten.index_copy_.default" not in OPERATORS


def test_a_program_that_lacks_what_it_returns_is_refused(dynamic):
    stored = json.loads(json.dumps(to_json(dynamic)))
    stored["variants"]["text"]["presents"].append("present.99.key")
    with pytest.raises(Exception, match="present.99.key"):
        from_json(stored)


def test_the_same_weights_in_the_same_places(traced, dynamic):
    names = {
        join(instance, slot.name)
        for region in traced.regions.values()
        for instance in region.instances
        for slot in region.slots
    }
    cached = {
        join(instance, slot.name)
        for region in dynamic.regions.values()
        for instance in region.instances
        for slot in region.slots
    }
    assert cached == names


def test_the_program_stays_as_it_is_and_shares_what_does_not_change(traced, language):
    before = {name: digest(region) for name, region in traced.regions.items()}
    variants = dict(traced.variants)
    cached = with_cache(traced)
    assert {name: digest(region) for name, region in traced.regions.items()} == before
    assert traced.variants == variants
    shared = [name for name in cached.regions if cached.regions[name] is traced.regions.get(name)]
    assert {"lm_head", f"{language}norm"} <= set(shared) and f"{language}layers" not in cached.regions


def test_what_has_a_cache_stays_as_it_is(traced, dynamic, language):
    new = dynamic.regions.keys() - traced.regions.keys()
    assert f"{language}layers.cached" in new
    assert all(name.endswith((".cached", ".images", ".tokens")) for name in new)
    for region in dynamic.regions.values():
        region.graph.graph.lint()
    assert with_cache(dynamic) is dynamic


def test_two_self_attentions_in_a_block_are_refused(traced, language):
    program = copy.deepcopy(traced)
    region = program.regions[f"{language}layers"]
    node = next(n for n in region.graph.graph.nodes if "vlmbuild.attention" in str(n.target))
    with region.graph.graph.inserting_after(node):
        second = region.graph.graph.call_function(node.target, node.args)
    with region.graph.graph.inserting_after(second):
        total = region.graph.graph.call_function(torch.ops.aten.add.Tensor, (node, second))
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    with pytest.raises(PassError, match=f"{language}layers has 2 causal attention operators"):
        with_cache(program)

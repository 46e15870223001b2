"""Splitting regions by images and tokens: the same values, and no token in the first part."""

from __future__ import annotations

import torch
from tiny import make_region, operators

from vlmbuild.ir.program import COMPUTE_DTYPE, Slot
from vlmbuild.kv_cache.split_images import split_images, split_region


def mixed():
    """Build a block that reads features, of which it makes keys, beside tokens."""
    slots = [Slot(name, (8, 8), COMPUTE_DTYPE, "parameter", "language") for name in ("q.weight", "k.weight")]
    slots.append(Slot("gate", (1,), COMPUTE_DTYPE, "parameter", "language"))

    def forward(q, k, gate, tokens, features):
        keys = torch.nn.functional.linear(features, k).transpose(0, 1)
        return (
            tokens + gate.tanh() * torch.nn.functional.linear(tokens, q) @ keys @ keys.transpose(0, 1),
            features * 2,
        )

    return make_region("blocks", forward, slots, [("tokens", 8), (4, 8)], ("blocks.0", "blocks.1"))


def run(region, tensors, activations):
    given = [tensors[slot.name] for slot in region.slots]
    return region.graph(*given, *activations)


def test_both_parts_make_what_the_whole_makes():
    region = mixed()
    split = split_region(region, frozenset({1}))
    tensors = {slot.name: torch.randn(slot.shape, dtype=COMPUTE_DTYPE) for slot in region.slots}
    tokens, features = (torch.randn(5, 8, dtype=COMPUTE_DTYPE) for _ in range(2))
    features = features[:4]
    whole = run(region, tensors, (tokens, features))
    assert (split.image_inputs, split.token_inputs) == ((1,), (0,))
    crossing = dict(zip(split.crossing, run(split.images, tensors, (features,)), strict=True))
    (hidden,) = run(split.tokens, tensors, (tokens, *(crossing[node] for node in split.passed)))
    assert torch.equal(hidden, whole[0]) and torch.equal(crossing[region.results()[1]], whole[1])


def test_weights_go_where_they_are_read():
    split = split_region(mixed(), frozenset({1}))
    assert [slot.name for slot in split.images.slots] == ["k.weight"]
    assert [slot.name for slot in split.tokens.slots] == ["q.weight", "gate"]
    assert "aten.tanh.default" in operators(split.tokens)  # reads weights alone
    assert split.images.instances == split.tokens.instances == ("blocks.0", "blocks.1")


def test_regions_of_one_kind_are_left_alone():
    region = mixed()
    assert split_region(region, frozenset()) is None
    assert split_region(region, frozenset({0, 1})) is None


def test_of_a_model_the_tower_is_images_and_the_blocks_are_tokens(built):
    split, images = split_images(built)
    assert images["text"] == frozenset()
    calls = {call.region: call for call in split.variants["image"].calls}
    for name, call in calls.items():
        read = images["image"].issuperset(call.inputs)
        assert read == (name.startswith("visual.") and not name.endswith(".tokens")), name
    assert built.variants["image"].calls[0] == split.variants["image"].calls[0]

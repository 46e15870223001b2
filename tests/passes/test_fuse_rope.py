"""Fusing rotary embeddings: the real model's regions, parity with unequal axes, refusals and idempotence."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from parity import MODEL_FP32, assert_close
from tiny import HEAD_DIM, SECTIONS, make_batch, make_region, operators, region_program

from vlmbuild.ir.printer import digest
from vlmbuild.ir.program import Rotary
from vlmbuild.ops.rope.op import interleave
from vlmbuild.passes import FuseRope, Normalize
from vlmbuild.rewrite.pass_manager import run

TEXT = Rotary(HEAD_DIM, SECTIONS, shared=False)


@pytest.fixture
def normalized(program):
    run([Normalize()], program)
    return program


def test_every_layer_and_table_of_the_model(normalized):
    (report,) = run([FuseRope()], normalized, require=("fuse_rope",))
    assert report.sites == {
        "visual.patch_embed.proj": 1,
        "visual.blocks": 1,
        "visual.merger.ln_q": 1,
        "language_model.layers": 1,
        "language_model.embed_tokens": 1,
    }
    assert report.matches == 3 + 2 + 3
    for name in ("visual.blocks", "language_model.layers"):
        found = operators(normalized.regions[name])
        assert found.count("vlmbuild.mrope_rotate.default") == 1
        assert "aten.neg.default" not in found


def test_tables_stay_in_float32(normalized):
    run([FuseRope()], normalized)
    layer = normalized.regions["language_model.layers"]
    tables = [node for node in layer.placeholders()[len(layer.slots) :] if node.meta["val"].shape[-1] == HEAD_DIM]
    assert [node.meta["val"].dtype for node in tables] == [torch.float32] * 2
    for name in ("visual.merger.ln_q", "language_model.embed_tokens"):
        results = normalized.regions[name].results()
        assert sum(node.target is torch.ops.aten.cat.default for node in results) == 2


def test_second_run_finds_nothing(normalized):
    run([FuseRope()], normalized)
    before = {name: digest(region) for name, region in normalized.regions.items()}
    (report,) = run([FuseRope()], normalized)
    assert report.sites == {}
    assert {name: digest(region) for name, region in normalized.regions.items()} == before


def test_forward_and_gradients_stay(normalized, bind):
    fused = copy.deepcopy(normalized)
    run([FuseRope()], fused)
    before, after = bind(normalized), bind(fused)
    batch, labels = make_batch([[3, (1, 4, 6), 5, (1, 8, 2), 4], [9, (2, 2, 4), 2]], "left")
    positions = after.family.prepare(batch, after.config).tensors["position_ids"]
    assert not torch.equal(positions[0], positions[1])
    assert not torch.equal(positions[1], positions[2])
    for model in (before, after):
        model(**batch, labels=labels).loss.backward()
    gradients = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        assert_close(parameter.grad, gradients[name].grad, MODEL_FP32, name)


def rotation(query, key, cos, sin, half=HEAD_DIM // 2, sign=-1):
    def rotate_half(x):
        return torch.cat((sign * x[..., half:] if sign != -1 else -x[..., half:], x[..., :half]), dim=-1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


def rotation_region(function):
    states, table = ("1", "2", "tokens", HEAD_DIM), ("1", "tokens", HEAD_DIM)
    return make_region("layers", function, (), [states, states, table, table], ("layers.0",))


def test_before_and_expected_graph():
    region = rotation_region(rotation)

    def expected(query, key, cos, sin):
        half = HEAD_DIM // 2
        return torch.ops.vlmbuild.mrope_rotate(query, key, cos[..., :half], sin[..., :half])

    run([FuseRope()], region_program(region, rotary=(TEXT,)))
    assert digest(region) == digest(rotation_region(expected))


def test_interleaved_tables_become_one_operator():
    shapes = [("3", "1", "tokens"), (str(HEAD_DIM // 2),)]
    rotary = Rotary(HEAD_DIM, (24, 20, 20), shared=False, interleaved=True)

    def tables(position_ids, inv_freq):
        angles = position_ids[..., None].float() * inv_freq
        halves = [interleave(table, rotary.sections) for table in (angles.cos(), angles.sin())]
        return tuple(torch.cat((half, half), dim=-1) for half in halves)

    def expected(position_ids, inv_freq):
        cos, sin = torch.ops.vlmbuild.mrope_cos_sin(position_ids, inv_freq, rotary.sections, False, 1.0, True)
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

    region, wanted = (make_region("tables", function, (), shapes, ("",)) for function in (tables, expected))
    for other in (replace(rotary, sections=(32, 16, 16)), replace(rotary, interleaved=False)):
        (report,) = run([FuseRope()], region_program(region, rotary=(other,)))
        assert report.sites == {}
    run([FuseRope()], region_program(region, rotary=(rotary,)))
    assert digest(region) == digest(wanted)


@pytest.mark.parametrize(
    "other",
    [
        lambda q, k, c, s: rotation(q, k, c, s, sign=2),  # not a rotation
        lambda q, k, c, s: rotation(q, k, c, s, half=HEAD_DIM // 4),  # partial halves
        lambda q, k, c, s: (q * c.unsqueeze(1), k * s.unsqueeze(1)),
    ],
)
def test_leaves_other_graphs_alone(other):
    region = rotation_region(other)
    before = digest(region)
    (report,) = run([FuseRope()], region_program(region, rotary=(TEXT,)))
    assert report.sites == {}
    assert digest(region) == before


def test_other_head_size_is_no_match(normalized):
    region = rotation_region(rotation)
    (report,) = run([FuseRope()], region_program(region, rotary=(Rotary(64, (8, 12, 12), shared=False),)))
    assert report.sites == {}

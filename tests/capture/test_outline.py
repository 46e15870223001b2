"""Outlining: the regions of the full model, sharing, sizes, names."""

from __future__ import annotations

import pytest
import tiny
import torch

from vlmbuild.capture.export import export
from vlmbuild.capture.outline import outline
from vlmbuild.errors import CaptureError
from vlmbuild.ir.printer import region_text
from vlmbuild.ir.program import COMPUTE_DTYPE, Input, join
from vlmbuild.runtime.torch.region import BoundRegion


@pytest.fixture(scope="module")
def full():
    """Six decoder layers and five vision blocks, of each more than `program` has."""
    return tiny.capture_program(tiny.make_config(layers=6, depth=5))


def test_any_depth_has_six_regions(full):
    names = list(dict.fromkeys(call.region for call in full.variants["image"].calls))
    assert [(name, len(full.regions[name].instances)) for name in names] == [
        ("visual.patch_embed.proj", 1),
        ("visual.blocks", 5),
        ("visual.merger.ln_q", 1),
        ("language_model.layers", 6),
        ("language_model.norm", 1),
        ("lm_head", 1),
    ]
    assert full.regions["visual.blocks"].instances[4] == "model.visual.blocks.4"
    assert len(full.variants["image"].calls) == 5 + 6 + 4


def test_graphs_do_not_grow_with_depth(full, program):
    for name, region in program.regions.items():
        assert region_text(full.regions[name]) == region_text(region)


def test_variants_share_the_decoder(program):
    image, text = program.variants["image"], program.variants["text"]
    shared = {call.region for call in image.calls} & {call.region for call in text.calls}
    assert shared == {"language_model.layers", "language_model.norm", "lm_head"}
    assert len(program.regions) == 7


def test_only_tensors_cross_borders(program):
    for region in program.regions.values():
        values = [node.meta["val"] for node in [*region.placeholders(), *region.results()]]
        assert all(isinstance(value, torch.Tensor) for value in values)
        assert len(region.placeholders()) == len(region.slots) + len(region.activations)
        assert all(node.users for node in region.placeholders())


def test_calls_are_in_static_single_assignment(program):
    for variant in program.variants.values():
        known = {entry.name for entry in variant.inputs}
        for call in variant.calls:
            assert set(call.inputs) <= known
            assert not set(call.outputs) & known
            known |= set(call.outputs)
        assert variant.output in known


def test_slots_are_the_models_parameters(program, reference, config):
    names = {name: slot for name, slot in program.slots() if slot.kind == "parameter"}
    parameters = dict(reference.named_parameters())
    assert {name: slot.shape for name, slot in names.items()} == {n: tuple(p.shape) for n, p in parameters.items()}
    assert {slot.dtype for slot in names.values()} == {COMPUTE_DTYPE}
    constants = {name for name, slot in program.slots() if slot.kind == "constant"}
    assert constants == set(tiny.FAMILY.constants(config))


def test_tied_head_uses_the_embeddings_slot(program):
    assert program.ties == {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    (slot,) = program.regions["lm_head"].slots
    assert slot.name == "model.language_model.embed_tokens.weight"


def test_head_is_the_last_call_and_nothing_but_the_product(program):
    for variant in program.variants.values():
        assert variant.calls[-1].region == "lm_head"
        assert len(variant.calls[-1].inputs) == 1
    assert tiny.operators(program.regions["lm_head"]) == ["aten.linear.default"]


def test_untied_head_has_a_slot_of_its_own():
    program = tiny.capture_program(tiny.make_config(layers=1, depth=1, tied=False))
    assert program.ties == {}
    assert "lm_head.weight" in dict(program.slots())
    assert dict(program.slots())["lm_head.weight"].role == "head"
    assert program.regions["language_model.layers"].instances == ("model.language_model.layers.0",)


class Blocks(torch.nn.Module):
    """Two blocks, each of which reads a parameter of its parent."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.empty(4, dtype=torch.bfloat16, device="meta"))
        self.layers = torch.nn.ModuleList(Block() for _ in range(2))

    def forward(self, values):
        for layer in self.layers:
            values = layer(values, self.scale)
        return values + self.scale


class Block(torch.nn.Module):
    def forward(self, values, scale):
        return values * scale


def test_block_with_a_parameter_of_another_module_is_refused(program):
    trace = export(Blocks(), (Input("values", COMPUTE_DTYPE, ("rows", 4)),), "a test")
    with pytest.raises(CaptureError, match=r"Block layers.0 uses the parameter scale of another module"):
        outline(tiny.FAMILY, program.geometry, {}, {"text": trace})


class Tiles(torch.nn.Module):
    """A class token before the patches of every tile: no input has the number of tiles."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Parameter(torch.empty(1, 1, 4, dtype=torch.bfloat16, device="meta"))

    def forward(self, values):
        tiles = values.view(-1, 3, 4)
        return -torch.cat([self.first.expand(tiles.shape[0], -1, -1), tiles], dim=1)


def test_a_size_that_no_input_has_is_read_where_it_is_computed(program):
    trace = export(Tiles(), (Input("values", COMPUTE_DTYPE, ("3*tiles", 4)),), "a test")
    region, _head = outline(tiny.FAMILY, program.geometry, {}, {"text": trace}).regions.values()
    (size,) = [node for node in region.graph.graph.nodes if node.target is torch.ops.aten.sym_size.int and node.users]
    assert size.args[0].target is torch.ops.aten.view.default
    first, values = torch.randn(1, 1, 4), torch.randn(6, 4)
    (found,) = BoundRegion(region, torch.float32, ()).graph(first, values)
    assert torch.equal(found, torch.cat([first.expand(2, -1, -1), values.view(2, 3, 4)], dim=1))


def test_roles_follow_the_module(program):
    roles = {
        join(region.instances[0], slot.name): slot.role for region in program.regions.values() for slot in region.slots
    }
    assert roles["model.visual.blocks.0.mlp.fc1.weight"] == "vision"
    assert roles["model.visual.merger.mlp.0.weight"] == "projector"
    assert roles["model.language_model.layers.0.self_attn.q_proj.weight"] == "language"
    assert roles["model.language_model.embed_tokens.weight"] == "embedding"

"""Blocks that are traced once: the same program as a full trace, and full traces of what is not surely equal."""

from __future__ import annotations

import matrix
import pytest
import tiny
import torch

from vlmbuild.capture.dedup_blocks import REPEAT, dedup_blocks
from vlmbuild.capture.export import ATTENTION, capture, export
from vlmbuild.capture.outline import outline
from vlmbuild.errors import CaptureError
from vlmbuild.ir.printer import program_text
from vlmbuild.ir.program import COMPUTE_DTYPE, Input, Region

ROWS = (Input("values", COMPUTE_DTYPE, ("rows", 4)),)


def repeats(trace):
    return sum(node.target is REPEAT for node in trace.exported.graph.nodes)


@pytest.mark.parametrize("name", ["qwen2_vl", pytest.param("mllama", marks=pytest.mark.slow)])
def test_program_is_that_of_a_full_trace(name):
    setup = matrix.SETUPS[name](False)
    family, config = setup.family, setup.config()
    variant, inputs = next(iter(family.variants(config).items()))  # the text alone has nothing that is not in the first
    once = capture(family, config, variant)
    full = export(family.module(config, variant, ATTENTION), inputs, "a test")
    assert repeats(once) >= 3
    assert not repeats(full)
    ours, theirs = (
        outline(family, family.geometry(config), family.ties(config), {variant: trace}) for trace in (once, full)
    )
    assert program_text(ours) == program_text(theirs)
    assert ours.variants == theirs.variants
    assert [facts(region) for region in ours.regions.values()] == [facts(region) for region in theirs.regions.values()]


def facts(region: Region):
    return region.name, region.slots, region.instances, region.activations, region.dimensions


class Block(torch.nn.Module):
    def __init__(self, number, factor=2.0, width=4, looks=False):
        super().__init__()
        self.layer_idx, self.factor, self.looks = number, factor, looks
        self.linear = torch.nn.Linear(4, width, bias=False, dtype=COMPUTE_DTYPE, device="meta")

    def forward(self, values, offset=0.0):
        factor = self.factor + (self.layer_idx if self.looks else 0)
        return values + self.linear(values)[:, :4] * factor + offset


class Model(torch.nn.Module):
    def __init__(self, *blocks, offsets=(0.0, 0.0, 0.0)):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.empty(4, dtype=COMPUTE_DTYPE, device="meta"))
        self.layers, self.offsets = torch.nn.ModuleList(blocks), offsets

    def forward(self, values):
        values = values * self.scale  # as embeddings do, it makes the first block's input one that needs a gradient
        for layer, offset in zip(self.layers, self.offsets, strict=True):
            values = layer(values, offset=offset)
        return values


def traced(model):
    with dedup_blocks(model):
        return export(model, ROWS, "a test")


def program(trace):
    return outline(tiny.FAMILY, tiny.FAMILY.geometry(tiny.make_config(1, 1)), {}, {"text": trace})


def test_equal_blocks_are_traced_once():
    trace = traced(Model(Block(0), Block(1), Block(2)))
    assert repeats(trace) == 2
    region = program(trace).regions["layers"]
    assert region.instances == ("layers.0", "layers.1", "layers.2")


def test_a_module_is_as_it_was_afterwards():
    model = Model(Block(0), Block(1), Block(2))
    traced(model)
    for number, block in enumerate(model.layers):
        assert type(block) is Block and block.layer_idx == number and "forward" not in vars(block)


def tied():
    model = Model(Block(0), Block(1), Block(2))
    model.layers[2].linear.weight = model.layers[1].linear.weight
    return model


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Model(Block(0), Block(1, factor=3.0), Block(2)), 1),
        (Model(Block(0), Block(1, width=8), Block(2)), 1),
        (Model(Block(0), Block(1), Block(2), offsets=(0.0, 1.0, 0.0)), 1),
        (Model(*(Block(number, looks=True) for number in range(3))), 0),
        (tied(), 0),
    ],
    ids=["attribute", "shape", "argument", "looks at its number", "tied"],
)
def test_blocks_that_differ_are_traced_in_full(model, expected):
    assert repeats(traced(model)) == expected


def test_number_that_is_looked_at_counts():
    """Each of three blocks that use their number has the constant of its own."""
    trace = traced(Model(*(Block(number, looks=True) for number in range(3))))
    regions = program(trace).regions.values()
    assert [region.instances for region in regions if region.instances[0]] == [
        ("layers.0",),
        ("layers.1",),
        ("layers.2",),
    ]


class Reader(torch.nn.Module):
    """Reads a value that was left on it, not given to it."""

    def forward(self, values):
        return values + self.seen


class Leaves(Model):
    def forward(self, values):
        values = values * self.scale
        for layer in self.layers:
            layer.__dict__["seen"] = values * 2.0
            values = layer(values)
        return values


def test_block_that_reads_more_than_its_arguments_is_refused():
    with pytest.raises(CaptureError, match=r"Block layers.1 reads or returns more than its arguments"):
        program(traced(Leaves(Reader(), Reader())))

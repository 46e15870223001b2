"""Capture: what must be in the traced graph, what must not, and what is refused."""

from __future__ import annotations

import pytest
import tiny
import torch

from vlmbuild.capture.export import capture, export
from vlmbuild.errors import CaptureError
from vlmbuild.ir.program import Input


@pytest.fixture(scope="module")
def traces():
    config = tiny.make_config(layers=1, depth=1)
    return {variant: capture(tiny.FAMILY, config, variant) for variant in tiny.FAMILY.variants(config)}


def test_promised_dimensions_are_symbols(traces):
    assert set(traces["image"].dimensions.values()) == {"sequence", "samples", "merged", "segments"}
    assert set(traces["text"].dimensions.values()) == {"sequence", "samples"}


def test_attention_is_one_operator_and_there_is_no_square_mask(traces):
    nodes = list(traces["image"].exported.graph.nodes)
    assert sum(node.target is torch.ops.vlmbuild.attention.default for node in nodes) == 2
    assert not any("scaled_dot_product" in str(node.target) or "softmax" in str(node.target) for node in nodes)
    sequence = next(node.meta["val"].shape[1] for node in nodes if node.name == "input_ids")
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            assert sum(str(size) == str(sequence) for size in value.shape) <= 1, node


def test_no_data_dependent_work(traces):
    for trace in traces.values():
        names = {str(node.target) for node in trace.exported.graph.nodes if node.op == "call_function"}
        assert not any(
            "item" in name.split(".")[1:2] or "repeat_interleave" in name or "nonzero" in name for name in names
        )


def test_everything_is_on_the_meta_device(traces):
    for parameter in traces["image"].exported.state_dict.values():
        assert parameter.is_meta


class Fixed(torch.nn.Module):
    def forward(self, values):
        return values.view(23, -1)


class Impossible(torch.nn.Module):
    def forward(self, values):
        return values * int(values.sum())


def test_dimension_that_becomes_a_constant_is_an_error():
    with pytest.raises(CaptureError, match=r"rows"):
        export(Fixed(), (Input("values", torch.float32, ("rows", 4)),), "a test")


def test_model_that_cannot_be_traced_is_an_error():
    with pytest.raises(CaptureError, match="Cannot trace a test") as caught:
        export(Impossible(), (Input("values", torch.int64, ("rows",)),), "a test")
    assert caught.value.__cause__ is not None

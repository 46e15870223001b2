"""Regions as inductor takes them: sizes that can be read off, and graphs that compute the same."""

import matrix
import pytest
import torch

from vlmbuild.ir.dims import evaluate_shape, parse_shape, shape_names
from vlmbuild.ir.shapes import annotate_shapes
from vlmbuild.kv_cache.program import with_cache
from vlmbuild.runtime.torch.region import with_dtype
from vlmbuild.targets.aoti.plan import token_axis
from vlmbuild.targets.aoti.region_graph import compilable, solvable_order, with_names


@pytest.mark.parametrize(
    ("shapes", "order"),
    [
        ([("n", 4)], (0,)),
        ([("batch*new",), ("batch", "past"), ("batch", "past + new")], (1, 0, 2)),
        ([("batch*new",), ("batch", "past + new"), ("batch", "past")], (2, 0, 1)),
        ([("4*merged", 8)], (0,)),
        ([("batch*new",), (3,)], None),
        ([(2, 3)], (0,)),
    ],
)
def test_order_in_which_sizes_can_be_solved(shapes, order):
    assert solvable_order([*map(parse_shape, shapes)]) == order


def test_sizes_that_cannot_be_solved_get_names():
    shapes = [("batch*new", 4), ("past + new", "batch*new")]
    assert with_names([*map(parse_shape, shapes)]) == tuple(map(parse_shape, [("d0", 4), ("d1", "d0")]))


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("qwen2_vl", "dynamic"),
        ("qwen2_vl", "static"),
        ("mllama", "dynamic"),
        ("pixtral", "dynamic"),
        ("mistral3", "dynamic"),
        ("qwen3_vl", "dynamic"),
    ],
)
def test_graphs_compute_what_regions_do(programs, family, form):
    """Also one token, no past, one row: sizes of 0 and 1 are no special case."""
    if family != "qwen2_vl":
        programs = {form: with_cache(matrix.program(matrix.tiny(family)), form)}
        annotate_shapes(programs[form])
    for region in programs[form].regions.values():
        graph, order = compilable(region, torch.float32)
        plain = with_dtype(region, torch.float32, dropout=False)
        small = ({"batch": 1, "new": 1, "past": 0}, {"batch": 3, "new": 1})
        for sizes in ({}, *small) if family == "qwen2_vl" else ({},):
            slots, activations = example(region, sizes)
            expected = plain(*slots, *(x.clone() for x in activations))
            found = graph(*slots, *(activations[place].clone() for place in order))
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["dynamic", "static"])
def test_graphs_for_one_token_compute_what_regions_do(programs, form):
    region = programs[form].regions["language_model.layers.cached"]
    graph, order = compilable(region, torch.float32, one_token=True)
    values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"][-len(order) :]
    place, axis = token_axis(region, form)
    assert values[order.index(place)].shape[axis] == 1
    slots, activations = example(region, {"batch": 1, "new": 1})
    expected = with_dtype(region, torch.float32, dropout=False)(*slots, *(x.clone() for x in activations))
    found = graph(*slots, *(activations[place].clone() for place in order))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def example(region, sizes):
    """Random tensors for a region's slots and activations."""
    sizes = {
        "batch": 2,
        "new": 3,
        "past": 5,
        "merged": 4,
        "segments": 3,
        "sequence": 6,
        "length": 9,
        "patches": 16,
    } | sizes
    sizes = dict.fromkeys(shape_names(region.activations), 4) | sizes
    made = []
    for node, shape in zip(region.placeholders()[len(region.slots) :], region.activations, strict=True):
        numbers = evaluate_shape(shape, sizes)
        dtype = node.meta["val"].dtype
        if parse_shape(["segments"])[0] in shape:
            made.append(torch.tensor([0, 4, 16], dtype=dtype))
        elif dtype.is_floating_point:
            made.append(torch.randn(numbers))
        else:
            made.append(torch.ones(numbers, dtype=dtype))
    return [torch.randn(slot.shape) * 0.05 for slot in region.slots], made

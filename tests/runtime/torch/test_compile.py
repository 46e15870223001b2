"""One compilation of every distinct region, over image sizes, batch sizes and adapters; results as without it."""

from __future__ import annotations

import matrix
import pytest
import torch
from adapters import fill_adapter
from parity import MODEL_FP32, assert_close
from tiny import make_batch
from torch._dynamo.testing import CompileCounterWithBackend

from vlmbuild.train.lora import add_lora

LAYOUTS = (
    [[5, (1, 4, 6), 7, (1, 8, 2), 3], [9, (1, 2, 2), 4]],
    [[3, (3, 4, 4), 7], [8, (1, 2, 2)], [5]],
    [[2, (1, 2, 2)]],
    [[12, (1, 4, 10), 9]],
)
"""Four batches: image sizes, image counts and batch sizes differ, down to one sample with one feature."""


@pytest.fixture
def counter(request):
    """Counts graphs; by default without what autograd makes of them."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend(getattr(request, "param", "eager"))
    torch._dynamo.reset()


with_autograd = pytest.mark.parametrize("counter", ["aot_eager"], indirect=True)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model, batch, labels):
    output = model(**batch, labels=labels)
    output.loss.backward()
    return output


def assert_same_step(compiled, model, layout):
    assert_same_results(compiled, model, *make_batch(layout))


def assert_same_results(compiled, model, batch, labels):
    model.zero_grad()
    ours = step(compiled, batch, labels)
    found = gradients(model)
    model.zero_grad()
    plain = step(model, batch, labels)
    expected = gradients(model)
    assert_close(ours.logits, plain.logits, MODEL_FP32)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert_close(found[name], grad, MODEL_FP32, name)


@with_autograd
def test_one_compilation_for_all_shapes(model, counter):
    compiled = torch.compile(model, backend=counter)
    regions = {call.region for call in model.program.variants["image"].calls}
    assert len(model.program.regions["language_model.layers"].instances) == 3
    for layout in LAYOUTS:
        assert_same_step(compiled, model, layout)
        assert counter.frame_count == len(regions) == 6
    assert_same_step(compiled, model, [[4], [9]])
    assert counter.frame_count == 7  # text-only batches have one region of their own


SIZES = (
    [[(90, 60), (40, 160)], [(100, 100)]],
    [[(30, 180)], [], [(64, 64)]],
    [[(1, 1)]],
    [[(120, 90), (50, 130)]],
)
"""Four batches of eight sizes of photographs, down to a single pixel."""


OTHERS = ("qwen2_vl", "qwen2_5_vl", "idefics3")
"""Families of which other tests show it, or that have the graphs of another one."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.release] * (name in OTHERS)) for name in matrix.SETUPS]
)
def test_one_compilation_for_all_image_sizes_of_every_family(name, counter):
    setup = matrix.tiny(name)
    model = matrix.bind(setup, matrix.program(setup), matrix.reference(setup))
    compiled = torch.compile(model, backend=counter)
    regions = {call.region for call in model.program.variants["image"].calls}
    photo = matrix.photographs()["rocket"]
    for sizes in SIZES:
        said = [["Look", *(photo.resize(size) for size in sample), "Describe them."] for sample in sizes]
        batch, labels = matrix.batch(setup, said, "right")
        assert_same_results(compiled, model, batch, labels)
        assert counter.frame_count == len(regions)
    batch, labels = matrix.batch(setup, [["Look"], ["Name three planets."]], "left")
    assert_same_results(compiled, model, batch, labels)
    text_only = {call.region for call in model.program.variants["text"].calls} - regions
    assert counter.frame_count == len(regions) + len(text_only)


def test_an_adapter_after_compilation_with_checkpointing(model, counter):
    model.gradient_checkpointing_enable()
    compiled = torch.compile(model, backend=counter)
    step(compiled, *make_batch(LAYOUTS[0]))
    before = counter.frame_count
    assert before == 6
    add_lora(compiled, r=4)
    fill_adapter(model, 0.1)
    for layout in LAYOUTS[:2]:
        assert_same_step(compiled, model, layout)
    assert gradients(model).keys() == {name for name, p in model.named_parameters() if ".lora_" in name}
    # the adapted region, and those around it whose tensors need other gradients now
    assert counter.frame_count - before <= 6


def test_training_and_evaluation_in_turn(model, counter):
    """Evaluation has graphs of its own, without gradients; coming back compiles nothing. In place, and with `fullgraph`."""
    model.compile(backend=counter, fullgraph=True)
    for turn, layout in enumerate(LAYOUTS[:3]):
        step(model.train(), *make_batch(layout))
        assert counter.frame_count == (12 if turn else 6)
        model.eval()
        with torch.no_grad():
            model(**make_batch(layout)[0])
        assert counter.frame_count == 12


def test_backend_sees_only_region_graphs(model):
    torch._dynamo.reset()
    seen = []

    def backend(graph, _example):
        seen.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph

    step(torch.compile(model, backend=backend), *make_batch(LAYOUTS[1]))
    torch._dynamo.reset()
    assert len(seen) == 6
    assert sum(any("attention_auto" in target for target in targets) for targets in seen) == 2
    assert not any("cross_entropy" in target for targets in seen for target in targets)

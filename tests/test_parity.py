"""Every family on what users send it: real processors and photographs, tiny models, against transformers."""

from __future__ import annotations

import copy
import itertools

import matrix
import pytest
import torch
from adapters import fill_adapter
from checkpoints import dequantized
from parity import BF16_RATIO, MODEL_FP32, SAME_WEIGHTS_FP32, assert_close, relative
from transformers import AutoModelForImageTextToText

from vlmbuild import add_lora, load, load_adapter, save_adapter
from vlmbuild.adapters.select import adaptable_layers
from vlmbuild.builder.build import build
from vlmbuild.recipe import QuantSpec, Recipe

CASES = (
    "one image",
    "several sizes",
    "counts differ, right",
    "counts differ, left",
    "text only",
    "very wide",
    "very tall",
    "smallest",
    "largest",
)


@pytest.fixture(scope="module", params=matrix.SETUPS)
def setup(request):
    return matrix.tiny(request.param)


@pytest.fixture(scope="module")
def batches(setup):
    return {name: matrix.batch(setup, *said) for name, said in matrix.conversations(setup).items()}


@pytest.fixture(scope="module")
def theirs(setup):
    return matrix.reference(setup)


@pytest.fixture(scope="module")
def ours(setup, theirs):
    return matrix.bind(setup, matrix.program(setup), theirs)


@pytest.fixture(scope="module")
def artifact(setup, theirs, tmp_path_factory):
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    theirs.save_pretrained(checkpoint)
    setup.processor.save_pretrained(checkpoint)
    out = tmp_path_factory.mktemp("built") / "nf4"
    return build(checkpoint, out, Recipe(quantize=QuantSpec(), dtype="float32")).path


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_every_gradient_equal_transformers(case, batches, ours, theirs):
    found = matrix.errors(ours, theirs, *batches[case])
    assert found["gradients"] >= 25  # of about as many that are more than rounding
    for what in ("logits", "loss", "gradient", "gate"):
        assert found[what] <= MODEL_FP32, (what, found)


def test_matrix_is_what_it_says(setup, batches):
    assert set(batches) == set(CASES)
    for case, (inputs, _) in batches.items():
        variant = setup.family.prepare(inputs, setup.config(), setup.processor).variant
        assert variant == ("text" if case == "text only" else "image"), case


def test_smallest_image_alone(setup, ours, theirs):
    """A single patch, whose attention has nothing to choose: its queries and keys have no gradient but rounding."""
    photo = matrix.photographs()["rocket"].resize(setup.smallest)
    inputs, labels = matrix.batch(setup, [[photo]], "right")
    with torch.no_grad():
        ours_out, theirs_out = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    assert_close(ours_out.logits, theirs_out.logits, MODEL_FP32)
    assert_close(ours_out.loss, theirs_out.loss, MODEL_FP32)


@pytest.fixture(scope="module")
def loaded(artifact):
    return load(artifact)


@pytest.fixture(scope="module")
def same(artifact):
    """transformers' model with the values of the artifact's 4-bit weights."""
    model = AutoModelForImageTextToText.from_pretrained(artifact, dtype=torch.float32)
    return matrix.positioned(dequantized(model)).eval()


def test_nf4_equals_transformers_with_the_same_packed_weights(same, loaded, batches, theirs):
    model, _ = loaded
    for case, (inputs, _) in batches.items():
        attended = inputs["attention_mask"].bool()
        with torch.no_grad():
            found = model(**inputs).logits[attended]
            assert_close(found, same(**inputs).logits[attended], SAME_WEIGHTS_FP32, case)
            assert relative(found, theirs(**inputs).logits[attended]) > 1e-3, case


def images_of(setup):
    """Return (sample, index into pixel_values) of every image of "counts differ", or of a tile of it: two images in the first
    sample, one in the second."""
    if setup.family.input_layout["pixel_values"] == "sample":
        return [(0, (0, 0)), (0, (0, 1)), (1, (1, 0))]
    (first, second, _), side = matrix.conversations(setup)["counts differ, left"]
    alone = [matrix.batch(setup, [[image, "Look!"]], side)[0] for image in (first[1], first[3], second[1])]
    bounds = [0, *itertools.accumulate(len(inputs["pixel_values"]) for inputs in alone)]
    return zip((0, 0, 1), itertools.starmap(slice, itertools.pairwise(bounds)), strict=True)


def test_every_image_changes_its_sample_and_no_other(setup, ours, batches):
    inputs, _ = batches["counts differ, left"]
    with torch.no_grad():
        before = ours(**inputs).logits
        for sample, place in images_of(setup):
            pixels = inputs["pixel_values"].clone()
            pixels[place] += 1
            after = ours(**{**inputs, "pixel_values": pixels}).logits
            for other in range(3):
                moved = relative(after[other], before[other])
                assert moved > 1e-4 if other == sample else moved < 1e-5


def test_processor_and_artifact_load_together(setup, loaded, batches):
    _, processor = loaded
    inputs, _ = batches["several sizes"]
    said, side = matrix.conversations(setup)["several sizes"]
    again, _ = matrix.batch(matrix.replace(setup, processor=processor), said, side)
    for key, value in inputs.items():
        assert torch.equal(again[key], value), key


def step(model, inputs, labels):
    model.zero_grad(set_to_none=True)
    model(**inputs, labels=labels).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@matrix.of_kinds
def test_checkpointing_gives_the_same_gradients(ours, batches):
    batch = batches["counts differ, right"]
    expected = step(ours, *batch)
    ours.gradient_checkpointing_enable()
    found = step(ours, *batch)
    ours.gradient_checkpointing_disable()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, MODEL_FP32, name)


@matrix.of_kinds
def test_bfloat16_error_is_no_larger_than_transformers(ours, theirs, batches):
    ours_narrow, theirs_narrow = (m.to(torch.bfloat16) for m in (matrix.copied(ours), copy.deepcopy(theirs)))
    squares, compared = [0.0, 0.0], 0
    for case, (inputs, _) in batches.items():
        attended = inputs["attention_mask"].bool()
        with torch.no_grad():
            exact, narrow, their_narrow = (m(**inputs).logits[attended] for m in (theirs, ours_narrow, theirs_narrow))
        assert narrow.isfinite().all(), case
        if their_narrow.isfinite().all():  # theirs are NaN for a very tall image on some processors
            squares[0] += (narrow - exact).norm().item() ** 2
            squares[1] += (their_narrow - exact).norm().item() ** 2
            compared += 1
    assert compared >= len(batches) - 1
    assert squares[0] ** 0.5 <= BF16_RATIO * squares[1] ** 0.5


def test_adapter_gives_peft_the_same_logits_and_trains_every_layer_kind(theirs, same, loaded, batches, tmp_path):
    from peft import PeftModel

    model = matrix.copied(loaded[0])
    parts = {"language", "projector"} & {layer.role for layer in adaptable_layers(model.program)}
    add_lora(model, r=4, target=tuple(parts))
    fill_adapter(model)
    inputs, labels = batches["counts differ, left"]
    gradients = step(model.train(), inputs, labels)
    adapted = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert gradients.keys() == adapted and all(gradient.norm() > 0 for gradient in gradients.values())
    save_adapter(model, tmp_path / "adapter")
    peft = PeftModel.from_pretrained(copy.deepcopy(same), tmp_path / "adapter").eval()
    attended = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, found = peft(**inputs).logits[attended], model.eval()(**inputs).logits[attended]
        assert_close(found, expected, SAME_WEIGHTS_FP32)
        assert relative(found, theirs(**inputs).logits[attended]) > 1e-3
    again = matrix.copied(loaded[0])
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits[attended], found)

"""Every family on what users send it: real processors and photographs, tiny models, against transformers."""

from __future__ import annotations

import matrix
import pytest
import torch
from checkpoints import dequantized
from parity import MODEL_FP32, SAME_WEIGHTS_FP32, assert_close, relative
from transformers import AutoModelForImageTextToText

from vlmbuild import load
from vlmbuild.builder import build
from vlmbuild.recipe import QuantSpec, Recipe

CASES = ("one image", "several sizes", "counts differ, right", "counts differ, left", "text only", "very wide",
         "very tall", "smallest", "largest")  # fmt: skip


@pytest.fixture(scope="module", params=matrix.SETUPS)
def setup(request):
    return matrix.shrink(matrix.SETUPS[request.param](False))


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
    for what in ("logits", "loss", "gradient"):
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


def test_nf4_equals_transformers_with_the_same_packed_weights(artifact, batches):
    model, _ = load(artifact)
    theirs = dequantized(AutoModelForImageTextToText.from_pretrained(artifact, dtype=torch.float32))
    for case, (inputs, _) in batches.items():
        attended = inputs["attention_mask"].bool()
        with torch.no_grad():
            expected = theirs.eval()(**inputs).logits[attended]
            assert_close(model(**inputs).logits[attended], expected, SAME_WEIGHTS_FP32, case)


def test_nf4_is_not_the_unquantized_model(artifact, batches, theirs):
    inputs, _ = batches["one image"]
    model, _ = load(artifact)
    with torch.no_grad():
        assert relative(model(**inputs).logits, theirs(**inputs).logits) > 1e-3


def test_every_image_changes_the_logits(setup, ours, batches):
    inputs, _ = batches["counts differ, left"]
    pixels = inputs["pixel_values"]
    with torch.no_grad():
        before = ours(**inputs).logits
        # Pixels of one image at a time: the rows of patches, or the images, that differ between samples.
        for part in torch.arange(len(pixels)).chunk(3):
            changed = pixels.clone()
            changed[part] += 1
            assert relative(ours(**{**inputs, "pixel_values": changed}).logits, before) > 1e-4


def test_processor_and_artifact_load_together(setup, artifact, batches):
    _, processor = load(artifact)
    inputs, _ = batches["several sizes"]
    said, side = matrix.conversations(setup)["several sizes"]
    again, _ = matrix.batch(matrix.replace(setup, processor=processor), said, side)
    for key, value in inputs.items():
        assert torch.equal(again[key], value), key

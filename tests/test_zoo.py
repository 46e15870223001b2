"""The packaged checkpoint does what it was trained for, also in four bits; the data is what its description says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText

from vlmbuild import load
from vlmbuild.builder import build
from vlmbuild.families import FAMILIES
from vlmbuild.recipe import QuantSpec, Recipe
from vlmbuild.zoo import ZOO
from vlmbuild.zoo.digits import Digits
from vlmbuild.zoo.task import LARGEST, READ, answers, exact_match, training_batch

DIRECTORY = ZOO["qwen2-vl-digits"]
SAMPLES = Digits("held_out", 11).take(600)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo") / "nf4"
    return build("qwen2-vl-digits", path, Recipe(quantize=QuantSpec(), dtype="float32")).path


@pytest.fixture(scope="module")
def processor():
    return FAMILIES["qwen2_vl"].processor(DIRECTORY)


def test_reads_digits_and_loses_little_in_four_bits(artifact, processor):
    theirs = exact_match(AutoModelForImageTextToText.from_pretrained(DIRECTORY).float(), processor, READ, SAMPLES)
    model, _ = load(artifact)
    ours = exact_match(model, processor, READ, SAMPLES)
    assert theirs >= 0.95
    assert ours >= theirs - 0.02
    assert exact_match(model, processor, LARGEST, SAMPLES[:100]) < 0.5  # there is something to teach


def test_generated_answers_agree_with_the_score(artifact):
    model, processor = load(artifact)
    right = [
        text == READ.answer(sample.digits)
        for text, sample in zip(answers(model, processor, READ, SAMPLES[:40]), SAMPLES, strict=False)
    ]
    assert sum(right) / 40 == exact_match(model, processor, READ, SAMPLES[:40])


def test_recorded_figures():
    record = json.loads((DIRECTORY / "training.json").read_text())
    assert record["held_out_exact_match"] >= 0.95
    assert record["command"] == "python -m vlmbuild.zoo.train OUTPUT --warm-up 2000 --steps 3500 --seed 0"
    assert sum(file.stat().st_size for file in DIRECTORY.glob("*.safetensors")) <= 3_000_000


def test_all_layer_kinds_and_published_sections():
    config = FAMILIES["qwen2_vl"].config(json.loads((DIRECTORY / "config.json").read_text()))
    text = config.text_config
    assert text.rope_parameters["mrope_section"] == [16, 24, 24]
    assert text.num_attention_heads > text.num_key_value_heads
    assert config.tie_word_embeddings


def test_canvases_vary_and_held_out_glyphs_are_new(processor):
    assert len({sample.image.size for sample in SAMPLES}) > 100
    assert {len(sample.digits) for sample in SAMPLES} == {1, 2, 3, 4}
    grids = training_batch(processor, READ, SAMPLES[:100])["image_grid_thw"]
    assert len({tuple(grid) for grid in grids.tolist()}) > 8
    train, held_out = Digits("train", 0), Digits("held_out", 0)
    seen = {image.tobytes() for image in train.images}
    assert len(train.labels) + len(held_out.labels) == 1797
    assert sum(image.tobytes() in seen for image in held_out.images) == 0


def test_samples_are_reproducible():
    first, second = Digits("train", 3, augment=True).take(5), Digits("train", 3, augment=True).take(5)
    assert [sample.digits for sample in first] == [sample.digits for sample in second]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, second, strict=True))


def test_labels_are_the_answer_and_its_end(processor):
    batch = training_batch(processor, LARGEST, SAMPLES[:8])
    for row, sample in enumerate(SAMPLES[:8]):
        kept = batch["labels"][row][batch["labels"][row] != -100]
        assert processor.tokenizer.decode(kept) == f"{max(sample.digits)}<|im_end|>"

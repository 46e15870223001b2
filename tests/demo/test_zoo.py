"""The packaged checkpoint does what it was trained for, also in four bits; the data is what its description says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoints import NAMES
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from vlmbuild import load
from vlmbuild.builder.build import build
from vlmbuild.demo.digits import Digits
from vlmbuild.demo.task import LARGEST, READ, answers, exact_match, training_batch
from vlmbuild.errors import UsageError
from vlmbuild.families import family_of
from vlmbuild.recipe import QuantSpec, Recipe
from vlmbuild.zoo import ZOO

SAMPLES = Digits("held_out", 11).take(300)
COMMANDS = {
    "qwen2-vl-digits": "python -m tests.zoo_training OUTPUT --warm-up 2000 --steps 3500 --seed 0",
    "mllama-digits": (
        "python -m tests.zoo_training OUTPUT --family mllama --resume BEFORE --warm-up 0 --steps 2500 --seed 2 --peak 0.0012"
    ),
    "pixtral-digits": "python -m tests.zoo_training OUTPUT --family pixtral --warm-up 3000 --steps 2500 --seed 0",
    "qwen3-vl-digits": "python -m tests.zoo_training OUTPUT --family qwen3_vl --warm-up 0 --steps 1500 --seed 0",
    "smolvlm2-digits": (
        "python -m tests.zoo_training OUTPUT --family smolvlm --resume BEFORE --warm-up 0 --steps 900 --seed 3 --peak 0.001"
    ),
}


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def config(name):
    values = json.loads((ZOO[name] / "config.json").read_text())
    return family_of(values, name).config(values)


@pytest.fixture(scope="module")
def processor(name, config):
    values = json.loads((ZOO[name] / "config.json").read_text())
    return family_of(values, name).processor(ZOO[name])


@pytest.fixture(scope="module")
def artifact(name, tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo") / "nf4"
    return load(build(name, path, Recipe(quantize=QuantSpec(), dtype="float32")).path)


def test_reads_digits_and_loses_little_in_four_bits(name, artifact, processor):
    theirs = exact_match(AutoModelForImageTextToText.from_pretrained(ZOO[name]).float(), processor, READ, SAMPLES)
    model, _ = artifact
    ours = exact_match(model, processor, READ, SAMPLES)
    assert theirs >= 0.94
    assert ours >= theirs - 0.02
    assert exact_match(model, processor, LARGEST, SAMPLES[:100]) < 0.5  # there is something to teach


def test_generated_answers_agree_with_the_score(artifact):
    model, processor = artifact
    right = [
        text == READ.answer(sample.digits)
        for text, sample in zip(answers(model, processor, READ, SAMPLES[:20]), SAMPLES, strict=False)
    ]
    assert sum(right) / 20 == exact_match(model, processor, READ, SAMPLES[:20])


def test_recorded_figures(name):
    record = json.loads((ZOO[name] / "training.json").read_text())
    assert record["held_out_exact_match"] >= 0.95
    assert record["command"] == COMMANDS[name]
    while "before" in record:
        record = record["before"]
    assert "--resume" not in record["command"]
    assert sum(file.stat().st_size for file in ZOO[name].glob("*.safetensors")) <= 3_000_000


def test_grouped_queries_and_published_specialities(name, config):
    text = config.text_config
    assert text.num_attention_heads > text.num_key_value_heads
    if name == "qwen2-vl-digits":
        assert text.rope_parameters["mrope_section"] == [16, 24, 24]
        assert config.tie_word_embeddings
    elif name == "mllama-digits":
        assert text.rope_parameters["rope_type"] == "llama3"
        assert 0 < len(text.cross_attention_layers) < text.num_hidden_layers
        assert config.image_token_id == text.vocab_size
        gates = [
            t
            for key, t in load_file(ZOO[name] / "model.safetensors").items()
            if key.endswith(("gate", "gate_attn", "gate_ffn"))
        ]
        assert len(gates) > 6 and min(gate.abs().min() for gate in gates) > 0.001
    elif name == "qwen3-vl-digits":
        assert text.rope_parameters["mrope_section"] == [24, 20, 20]
        assert len(config.vision_config.deepstack_visual_indexes) == 1
    else:
        assert text.head_dim != text.hidden_size // text.num_attention_heads
        assert not config.tie_word_embeddings
        assert config.vision_config.hidden_act == ("silu" if name == "pixtral-digits" else "gelu_pytorch_tanh")


def test_canvases_vary_and_held_out_glyphs_are_new(name, processor):
    assert len({sample.image.size for sample in SAMPLES}) > 100
    assert {len(sample.digits) for sample in SAMPLES} == {1, 2, 3, 4}
    batch = training_batch(processor, READ, SAMPLES[:100])
    key, kinds = {  # tiles come in eight aspect ratios only; SmolVLM makes one or three of a canvas
        "qwen2-vl-digits": ("image_grid_thw", 9),
        "mllama-digits": ("aspect_ratio_ids", 5),
        "pixtral-digits": ("image_sizes", 9),
        "qwen3-vl-digits": ("image_grid_thw", 9),
        "smolvlm2-digits": ("pixel_attention_mask", 2),
    }[name]
    assert len(batch[key].flatten(1).unique(dim=0)) >= kinds
    train, held_out = Digits("train", 0), Digits("held_out", 0)
    seen = {image.tobytes() for image in train.images}
    assert len(train.labels) + len(held_out.labels) == 1797
    assert sum(image.tobytes() in seen for image in held_out.images) == 0


def answer_logits(model, processor, samples):
    batch = training_batch(processor, READ, samples)
    labels = batch.pop("labels")
    with torch.no_grad():
        return model(**batch).logits[:, :-1][labels[:, 1:] != -100]


def test_a_budget_buys_more_where_it_is_measured(tmp_path):
    """5 bits for every layer alike (blocks of 32, scales in float32), and 5 bits on average where they matter."""
    source = "qwen2-vl-digits"
    plain, processor = load(build(source, tmp_path / "plain", Recipe()).path, dtype="float32")
    expected = answer_logits(plain, processor, SAMPLES[:80])
    batches = [training_batch(processor, READ, SAMPLES[start : start + 16]) for start in (260, 276)]
    batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    specs = {
        "uniform": (QuantSpec(blocksize=32, double_quant=False), ()),
        "auto": (QuantSpec("auto", budget=5.0), batches),
    }
    errors, sizes = {}, {}
    for name, (spec, calibration) in specs.items():
        built = build(source, tmp_path / name, Recipe(quantize=spec), calibration=calibration)
        found = answer_logits(load(built.path, dtype="float32")[0], processor, SAMPLES[:80])
        errors[name] = ((found - expected).norm() / expected.norm()).item()
        sizes[name] = built.manifest.entry("model.safetensors").size
    assert sizes["auto"] <= sizes["uniform"]
    assert errors["auto"] < 0.95 * errors["uniform"]


def test_samples_are_reproducible():
    first, second = Digits("train", 3, augment=True).take(5), Digits("train", 3, augment=True).take(5)
    assert [sample.digits for sample in first] == [sample.digits for sample in second]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, second, strict=True))


def test_labels_are_the_answer_and_its_end(processor):
    batch = training_batch(processor, LARGEST, SAMPLES[:8])
    for row, sample in enumerate(SAMPLES[:8]):
        kept = batch["labels"][row][batch["labels"][row] != -100]
        answer = processor.tokenizer.decode(kept).lstrip()  # SmolVLM's template writes a space before it
        assert answer == f"{max(sample.digits)}{processor.tokenizer.eos_token}"


def test_an_unknown_split_of_the_digits():
    with pytest.raises(UsageError, match="'test'.*train, held_out"):
        Digits("test", 0)

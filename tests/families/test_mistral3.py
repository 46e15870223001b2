"""Mistral 3: blocks of patches, positions that scale queries, Mistral Small's language model, tied embeddings, refusals."""

from __future__ import annotations

import copy
import json
import warnings

import matrix
import pytest
import torch
from parity import MODEL_FP32, assert_close, relative
from processors import CONFIGS, photographs

from vlmbuild.errors import BatchError, SourceError
from vlmbuild.families import FAMILIES

FAMILY = FAMILIES["mistral3"]


@pytest.fixture(scope="module")
def setup():
    return matrix.tiny("mistral3")


@pytest.fixture(scope="module")
def config(setup):
    return setup.config()


@pytest.fixture(scope="module")
def theirs(setup):
    return matrix.reference(setup).eval()


def changed(values, **text):
    """Copy the values of a config with other ones of the language model."""
    return {**values, "text_config": {**values["text_config"], **text}}


@pytest.fixture
def batch(setup):
    """Samples with two images, one, and none, padded on the right."""
    return matrix.batch(setup, *matrix.conversations(setup)["counts differ, right"])[0]


def test_prologue_orders_patches_by_blocks(setup, batch, config):
    tensors = FAMILY.prepare(batch, config, setup.processor).tensors
    sizes = [(h // 14, w // 14) for h, w in batch["image_sizes"].tolist()]
    assert len(set(sizes)) > 1
    bounds = torch.tensor([0, *(rows * columns for rows, columns in sizes)]).cumsum(0)
    assert tensors["vision_cu_seqlens"].tolist() == [*bounds.tolist(), int(bounds[-1])]
    for number, (rows, columns) in enumerate(sizes):
        patches = tensors["pixel_values"][bounds[number] : bounds[number + 1]]
        positions = tensors["vision_position_ids"][bounds[number] : bounds[number + 1]].tolist()
        assert positions[:5] == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]]
        assert sorted(positions) == [[row, column] for row in range(rows) for column in range(columns)]
        for patch, (row, column) in zip(patches, positions, strict=True):
            place = (slice(None), slice(14 * row, 14 * row + 14), slice(14 * column, 14 * column + 14))
            assert torch.equal(patch.view(3, 14, 14), batch["pixel_values"][number][place])
    assert int((tensors["feature_index"] >= 0).sum()) == int(bounds[-1]) // 4


def test_positions_scale_queries_and_padding_on_the_left_does_not_count(setup, config, theirs):
    said, _ = matrix.conversations(setup)["counts differ, left"]
    left, labels = matrix.batch(setup, said, "left")
    assert (
        int(left["attention_mask"].sum(1).max())
        > 2 * config.text_config.rope_parameters["original_max_position_embeddings"]
    )
    model = matrix.bind(setup, matrix.program(setup), theirs).eval()
    right, _ = matrix.batch(setup, said, "right")
    warned = pytest.warns(UserWarning, match=r"scale queries from 8 on.*padding_side=\"right\"")
    with torch.no_grad():
        with warned:
            model(**left, labels=labels)
        with warned:
            found = [model(**left).logits[left["attention_mask"].bool()]]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(model(**right).logits[right["attention_mask"].bool()])
            model.generate(**left, max_new_tokens=1, pad_token_id=0)
        assert_close(*found, MODEL_FP32)
        plain = copy.deepcopy(theirs)
        plain._forward_pre_hooks.clear()
        moved = plain(**left).logits[left["attention_mask"].bool()]
    assert relative(moved, found[0]) > 1e-3


def test_a_single_feature_alone(setup, theirs):
    """transformers fails on it unless another image is beside it."""
    photo = photographs()["rocket"]
    model = matrix.bind(setup, matrix.program(setup), theirs).eval()
    alone, _ = matrix.batch(setup, [[photo.resize((9, 9)), "What?"]], "right")
    beside, _ = matrix.batch(setup, [[photo.resize((9, 9)), "What?"], [photo]], "right")
    length = alone["input_ids"].shape[1]
    with torch.no_grad():
        expected = theirs(**beside).logits[:1, :length]
        assert_close(model(**beside).logits[:1, :length], expected, MODEL_FP32)
        assert_close(model(**alone).logits, expected, MODEL_FP32)


def test_mistral_small_equals_transformers(setup):
    """Its language model is Mistral's, and its queries have no scale."""
    rope = {"rope_type": "default", "rope_theta": 1e9}
    small = matrix.replace(
        setup, values=changed(setup.values, model_type="mistral", sliding_window=None, rope_parameters=rope)
    )
    theirs = matrix.reference(small)
    ours = matrix.bind(small, matrix.program(small), theirs)
    found = matrix.errors(ours, theirs, *matrix.batch(small, *matrix.conversations(small)["counts differ, right"]))
    assert max(found[what] for what in ("logits", "loss", "gradient")) <= MODEL_FP32, found
    operators = {str(node.target) for region in ours.program.regions.values() for node in region.graph.graph.nodes}
    assert "aten.log.default" not in operators


def test_embeddings_are_tied_where_the_config_says_so(setup):
    for top, text, tied in ((None, None, False), (True, None, True), (None, True, True), (False, True, False)):
        values = changed(setup.values, **({} if text is None else {"tie_word_embeddings": text}))
        values |= {} if top is None else {"tie_word_embeddings": top}
        assert bool(FAMILY.ties(FAMILY.config(values))) == tied, (top, text)
    published = {name: json.loads((CONFIGS / name / "config.json").read_text()) for name in SIZES}
    assert [name for name, values in published.items() if FAMILY.ties(FAMILY.config(values))] == ["ministral-3-3b"]


SIZES = ("mistral-small-3.1-24b", "ministral-3-3b", "ministral-3-8b", "ministral-3-14b")


def test_bad_images_are_named(batch, config):
    cut = {key: batch[key][:, :-90] for key in ("input_ids", "attention_mask")}
    for changes, message in (
        (cut, "Sample 0: image 0 .* features, but the text holds"),
        ({"image_sizes": torch.tensor([[28, 42]] * 3)}, "image 0: 28 x 42 pixels are not made of 28 x 28 squares"),
    ):
        with pytest.raises(BatchError, match=message):
            FAMILY.prepare({**batch, **changes}, config)


def test_configs_that_would_be_captured_wrongly_are_refused(setup):
    rope = setup.values["text_config"]["rope_parameters"]
    for part, changes, message in (
        ("", {"vision_feature_layer": -2}, "vision_feature_layer -2"),
        ("", {"vision_feature_layer": [-2, -1]}, r"vision_feature_layer \[-2, -1\]"),
        ("", {"spatial_merge_size": 1}, "spatial_merge_size 1 must be at least 2"),
        ("text_config", {"sliding_window": 0}, "sliding_window 0 must be a whole number"),
        ("text_config", {"model_type": "llama"}, "pixtral and llama.* pixtral and mistral or pixtral and ministral3"),
        ("text_config", {"rope_parameters": {**rope, "llama_4_scaling_beta": None}}, "llama_4_scaling_beta None"),
        ("text_config", {"rope_parameters": {**rope, "llama_4_scaling_beta": -1}}, "llama_4_scaling_beta -1"),
        ("vision_config", {"attention_dropout": 0.1}, "vision_config.attention_dropout 0.1"),
    ):
        values = copy.deepcopy(setup.values)
        (values[part] if part else values).update(changes)
        with pytest.raises(SourceError, match=message):
            FAMILY.config(values)


def test_an_image_costs_its_rows_with_their_ends():
    whole = matrix.SETUPS["mistral3"](full=True)
    cost = FAMILY.image_cost(whole.processor.image_processor, whole.config(), 100, 160)
    assert cost == (4 * 4 * 6, 4 * 7, 0, 1)

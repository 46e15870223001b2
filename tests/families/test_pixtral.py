"""Pixtral: regions, patches and positions of the host prologue, independence of padding and neighbours, refusals."""

from __future__ import annotations

import copy

import matrix
import pytest
import torch
from parity import MODEL_FP32, assert_close
from processors import photographs
from transformers.activations import GELUActivation, SiLUActivation

from vlmbuild.errors import BatchError, SourceError
from vlmbuild.families import FAMILIES

FAMILY = FAMILIES["pixtral"]


@pytest.fixture(scope="module")
def setup():
    return matrix.tiny("pixtral")


@pytest.fixture(scope="module")
def config(setup):
    return setup.config()


@pytest.fixture(scope="module")
def program(setup):
    return matrix.program(setup)


@pytest.fixture(scope="module")
def model(setup, program):
    return matrix.bind(setup, program, matrix.reference(setup)).eval()


@pytest.fixture
def batch(setup):
    """Samples with two images, one, and none, padded on the left; a copy that a test may spoil."""
    return matrix.batch(setup, *matrix.conversations(setup)["counts differ, left"])[0]


def test_layers_are_regions_and_sizes_stay_out_of_the_graph(program):
    instances = {name: len(region.instances) for name, region in program.regions.items() if region.instances[0]}
    assert instances == {"vision_tower.transformer.layers": 2, "language_model.layers": 3}
    assert {entry.name for entry in program.variants["image"].inputs} >= {"pixel_values", "vision_position_ids"}
    assert "image_sizes" not in {entry.name for entry in program.variants["image"].inputs}


def test_rotary_embeddings_of_tower_and_text_are_fused_with_the_published_frequencies(program, config):
    tables, rotations = [], 0
    for region in program.regions.values():
        for node in region.graph.graph.nodes:
            if node.target is torch.ops.vlmbuild.mrope_cos_sin.default:
                tables.append((tuple(node.args[2]), node.args[3]))
            rotations += node.target is torch.ops.vlmbuild.mrope_rotate.default
    assert sorted(tables) == [((8, 8), False), ((32,), False), ((32,), False)]
    assert rotations == 2
    frequencies = FAMILY.constants(config)["model.vision_tower.patch_positional_embedding.inv_freq"]
    every = 1 / 1e4 ** (torch.arange(0, 32, 2) / 32)
    assert torch.allclose(frequencies, torch.cat([every[0::2], every[1::2]]))  # even for height, odd for width


def test_prologue_cuts_patches_and_counts_positions(setup, batch, config):
    tensors = FAMILY.prepare(batch, config, setup.processor).tensors
    sizes = [(h // 16, w // 16) for h, w in batch["image_sizes"].tolist()]
    assert len(set(sizes)) > 1
    bounds = torch.tensor([0, *(rows * columns for rows, columns in sizes)]).cumsum(0)
    assert tensors["vision_cu_seqlens"].tolist() == [*bounds.tolist(), int(bounds[-1])]
    for number, (rows, columns) in enumerate(sizes):
        patches = tensors["pixel_values"][bounds[number] : bounds[number + 1]].view(rows, columns, 3, 16, 16)
        positions = tensors["vision_position_ids"][bounds[number] : bounds[number + 1]].view(rows, columns, 2)
        for row, column in ((0, 0), (rows - 1, 0), (rows - 1, columns - 1), (rows // 2, columns // 3)):
            place = (slice(None), slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16))
            assert torch.equal(patches[row, column], batch["pixel_values"][number][place])
            assert positions[row, column].tolist() == [row, column]


def test_break_and_end_tokens_get_no_features(setup, batch, config):
    tensors = FAMILY.prepare(batch, config).tensors
    ids, index = tensors["input_ids"], tensors["feature_index"]
    image, line_break, end = setup.ids(setup.media)
    assert torch.equal(index >= 0, ids == image)
    assert (ids == line_break).sum() > 3 and (ids == end).sum() == 3
    assert torch.equal(index[index >= 0], torch.arange(int((ids == image).sum())))


def test_padding_of_images_has_no_influence_and_samples_are_independent(setup, model, batch):
    padded = {**batch, "pixel_values": batch["pixel_values"].clone()}
    for pixels, (height, width) in zip(padded["pixel_values"], batch["image_sizes"].tolist(), strict=True):
        pixels[:, height:], pixels[:, :, width:] = 7, 7
    said, _ = matrix.conversations(setup)["counts differ, left"]
    alone, _ = matrix.batch(setup, said[1:2], "left")
    length = alone["input_ids"].shape[1]
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(model(**padded).logits, expected)
        assert_close(model(**alone).logits, expected[1:2, -length:], MODEL_FP32)


def test_images_without_sizes_fill_the_tensor(setup, model):
    inputs, _ = matrix.batch(setup, [["Look", photographs()["astronaut"]]], "right")
    bare = {key: value for key, value in inputs.items() if key != "image_sizes"}
    with torch.no_grad():
        assert torch.equal(model(**bare).logits, model(**inputs).logits)


def test_bad_images_are_named(batch, config):
    cut = {key: batch[key][:, :-30] for key in ("input_ids", "attention_mask")}
    for changes, message in (
        (cut, "Sample 0: image 1 .* has 96 features, but the text holds"),
        ({"image_sizes": torch.tensor([[10, 16]] * 3)}, "image 0: 10 x 16 pixels are not made of 16 x 16 squares"),
        ({"image_sizes": batch["image_sizes"][:2]}, "image_sizes has shape"),
        ({"pixel_values": batch["pixel_values"][:, :1]}, "pixel_values must be a tensor of shape"),
    ):
        with pytest.raises(BatchError, match=message):
            FAMILY.prepare({**batch, **changes}, config)


def test_images_in_another_order_are_refused_though_their_features_are_as_many(setup, config):
    wide, tall = photographs()["rocket"].resize((64, 32)), photographs()["rocket"].resize((32, 64))
    inputs, _ = matrix.batch(setup, [[wide, "and", tall]], "right")
    FAMILY.prepare(inputs, config)
    for key in ("pixel_values", "image_sizes"):
        inputs[key] = inputs[key].flip(0)
    with pytest.raises(
        BatchError, match=r"Sample 0: image 0 \(grid 1 x 4 x 2\) has 8 features, but the text holds 2 .* order"
    ):
        FAMILY.prepare(inputs, config)


def test_batch_of_a_processor_with_another_limit_is_refused(setup, config):
    larger = matrix.SETUPS["pixtral"](True).processor
    made = matrix.replace(setup, processor=larger)
    inputs, _ = matrix.batch(made, [["Look", photographs()["astronaut"]]], "right")
    with pytest.raises(BatchError, match="allows no edge over 192: the batch was made with other limits"):
        FAMILY.prepare(inputs, config, setup.processor)
    FAMILY.prepare(inputs, config, larger)


def test_configs_that_would_be_captured_wrongly_are_refused(setup):
    for part, changes, message in (
        ("", {"vision_feature_layer": -2}, "vision_feature_layer"),
        ("", {"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        ("text_config", {"sliding_window": 0}, "sliding_window 0 must be a whole number"),
        ("text_config", {"model_type": "llama", "head_dim": 32}, "pixtral and llama"),
        ("vision_config", {"model_type": "clip_vision_model"}, "clip_vision_model and mistral"),
        ("vision_config", {"attention_dropout": 0.1}, "vision_config.attention_dropout 0.1"),
        ("vision_config", {"patch_size": [16, 16]}, r"patch_size \[16, 16\] must be a whole number"),
    ):
        values = copy.deepcopy(setup.values)
        (values[part] if part else values).update(changes)
        with pytest.raises(SourceError, match=message):
            FAMILY.config(values)


def test_an_image_costs_its_rows_with_their_ends():
    whole = matrix.SETUPS["pixtral"](False)
    cost = FAMILY.image_cost(whole.processor.image_processor, whole.config(), 96, 160)
    assert cost == (6 * 10, 6 * 11, 0, 1)
    with pytest.raises(ValueError, match="nothing is left of it"):
        FAMILY.image_cost(whole.processor.image_processor, whole.config(), 1, 99999)


def test_hidden_act_of_the_checkpoint_is_traced(setup):
    for name, kind in (("gelu", GELUActivation), ("silu", SiLUActivation)):
        values = copy.deepcopy(setup.values)
        values["vision_config"]["hidden_act"] = name
        module = FAMILY.module(FAMILY.config(values), "image", "eager")
        assert isinstance(module.model.vision_tower.transformer.layers[0].feed_forward.act_fn, kind)

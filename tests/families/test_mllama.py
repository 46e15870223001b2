"""Llama 3.2 Vision: regions, the host prologue's groups, what text depends on, refused batches and configs."""

from __future__ import annotations

import copy

import matrix
import pytest
import torch
from parity import relative

from vlmbuild.errors import BatchError, SourceError, UsageError
from vlmbuild.families import FAMILIES
from vlmbuild.ir.dims import parse_shape

FAMILY = FAMILIES["mllama"]


@pytest.fixture(scope="module")
def setup():
    return matrix.tiny("mllama")


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


def test_self_cross_local_and_global_layers_are_regions(program):
    instances = {name: len(region.instances) for name, region in program.regions.items() if region.instances[0]}
    assert instances == {
        "vision_model.transformer.layers": 4,
        "vision_model.global_transformer.layers": 2,
        "language_model.layers": 3,
        "language_model.layers.cross_attn": 2,
    }
    assert program.regions["language_model.layers.cross_attn"].instances[1] == "model.language_model.layers.3"


def test_text_variant_skips_the_cross_layers(program):
    called = {name: [call.region for call in variant.calls] for name, variant in program.variants.items()}
    assert called["image"].count("language_model.layers.cross_attn") == 2
    assert "language_model.layers.cross_attn" not in called["text"]
    assert called["text"].count("language_model.layers") == 3


def test_every_attention_is_the_operator_and_no_mask_is_dense(program):
    """Only the groups that a query sees have two dimensions that grow with the batch."""
    dynamic = set()
    for region in program.regions.values():
        for node in region.graph.graph.nodes:
            assert "softmax" not in str(node.target) and "scaled_dot" not in str(node.target)
            shape = getattr(node.meta.get("val"), "shape", ())
            if sum(not str(size).isdigit() for size in shape) > 1:
                dynamic.add(node.name)
    assert dynamic == {"visible_patches", "visible_tiles"}
    groups = program.regions["vision_model.transformer.layers"].activations[2]
    assert groups == parse_shape((f"{4 * 72}*images", "2*images"))


def test_prologue_groups_say_what_transformers_masks_say(setup, batch, config):
    """The dense masks of transformers' own helpers, for every row and key."""
    from transformers.models.mllama.modeling_mllama import (
        _prepare_aspect_ratio_attention_mask,
        _prepare_cross_attention_mask,
    )

    tensors = FAMILY.prepare(batch, config).tensors
    rows = tensors["patch_groups"].numel() // 6  # three samples of two images each
    ratio_mask = batch["aspect_ratio_mask"].flatten(0, 1)
    theirs = _prepare_aspect_ratio_attention_mask(ratio_mask, 65, rows // 4, torch.float32)[:, 0] == 0
    ours = tensors["visible_patches"][:, tensors["patch_groups"].long()]
    expected = torch.block_diag(*theirs)
    assert torch.equal(ours, expected.bool())
    assert not theirs.all()

    bias, seen = _prepare_cross_attention_mask(batch["cross_attention_mask"], 65, torch.float32)
    dense = tensors["visible_tiles"][:, tensors["feature_groups"].long()].unflatten(1, (3, -1))
    attended = batch["attention_mask"].bool()
    samples = torch.arange(3)[:, None].expand_as(attended)[attended]
    for row, sample, expected_row in zip(dense, samples, bias[:, 0][attended], strict=True):
        assert torch.equal(row[sample], expected_row == 0)
        assert not row[[other for other in range(3) if other != sample]].any()
    assert torch.equal(tensors["sees_image"], seen[:, 0, :, 0][attended].bool())
    assert 0 < tensors["sees_image"].sum() < len(samples)


def last_logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_text_depends_on_every_image_and_on_the_cross_mask(model, batch):
    before = last_logits(model, batch)
    for sample, image in ((0, 0), (0, 1), (1, 0)):
        changed = {**batch, "pixel_values": batch["pixel_values"].clone()}
        changed["pixel_values"][sample, image, 0] += 1
        after = last_logits(model, changed)
        assert relative(after[sample], before[sample]) > 1e-4
        others = [other for other in range(3) if other != sample]
        assert relative(after[others], before[others]) < 1e-5  # the same, but for the order of sums
    masked = {**batch, "cross_attention_mask": batch["cross_attention_mask"].clone()}
    masked["cross_attention_mask"][0, -3:] = masked["cross_attention_mask"][0, -3:].flip(1)  # the other image
    after = last_logits(model, masked)
    assert relative(after[0, -3:], before[0, -3:]) > 1e-4
    assert relative(after[0, :-3], before[0, :-3]) < 1e-5


def test_text_in_a_mixed_batch_sees_padding_images_as_in_transformers(setup, model, batch):
    """A sample without images gets other logits beside images than alone, where cross layers are skipped."""
    said, side = matrix.conversations(setup)["counts differ, left"]
    alone, _ = matrix.batch(setup, said[2:], side)
    length = alone["input_ids"].shape[1]
    assert relative(last_logits(model, batch)[2:, -length:], last_logits(model, alone)) > 1e-3


def test_bad_tiles_are_named(batch, config):
    ratios, tiles, cross = (
        batch[key].clone() for key in ("aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")
    )
    ratios[1, 0] = 9
    tiles[1, 0] = 0
    pixels = batch["pixel_values"]
    for changes, message in (
        ({"aspect_ratio_ids": ratios}, "Sample 1: image 0 has aspect ratio id 9 and .* 8 aspect ratios"),
        ({"aspect_ratio_mask": tiles}, "Sample 1: image 0 has aspect ratio id . and 0 tiles"),
        ({"pixel_values": pixels.repeat(1, 1, 2, 1, 1, 1)}, "8 tiles an image.*at most 4"),
        ({"pixel_values": pixels[..., :56, :56]}, "pixel_values has shape .* need"),
        ({"cross_attention_mask": cross[:, :-1]}, "cross_attention_mask has shape .* need"),
        ({"aspect_ratio_ids": None}, "no aspect_ratio_ids of shape"),
        ({"cross_attention_mask": None}, "no cross_attention_mask of shape"),
    ):
        with pytest.raises(BatchError, match=message):
            FAMILY.prepare({**batch, **changes}, config)


def test_configs_that_would_be_captured_wrongly_are_refused(setup):
    for part, changes, message in (
        ("text_config", {"cross_attention_layers": [1, 9]}, "cross_attention_layers .* must name some"),
        ("text_config", {"dropout": 0.1}, "attention dropout 0.1"),
        ("vision_config", {"vision_output_dim": 100}, "vision_output_dim 100 must be 192"),
        ("vision_config", {"intermediate_layers_indices": [0, 99]}, "intermediate_layers_indices .* 4 local layers"),
        ("vision_config", {"image_size": 115}, "image_size 115 is not a multiple of patch_size 14"),
    ):
        values = copy.deepcopy(setup.values)
        values[part] |= changes
        with pytest.raises(SourceError, match=message):
            FAMILY.config(values)
    with pytest.raises(SourceError, match="image_token_index 3 .* after the vocabulary"):
        FAMILY.config({**setup.values, "image_token_index": 3})


def test_an_image_costs_its_padded_tiles(setup, batch, config):
    cost = FAMILY.image_cost(setup.processor, config, 300, 300)
    assert cost == (4 * 72, 1, 4 * 65, 1)
    tensors = FAMILY.prepare(batch, config).tensors  # three samples of two images
    assert (len(tensors["patch_groups"]), len(tensors["feature_groups"])) == (6 * cost.patches, 6 * cost.cross_keys)


def test_rows_after_the_vocabulary(model, batch):
    """Their ids have embeddings and no logits, so that no label may be one, and no checkpoint has rows behind them."""
    image, rows = model.config.image_token_id, model.vocabulary
    assert image == rows
    with pytest.raises(UsageError, match=r"8 rows after the vocabulary.*reserved tokens"):
        model.resize_token_embeddings(rows + 20)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, -1] = rows + 1
    with pytest.raises(BatchError, match=f"1 labels are no token ids from 0 to {rows - 1}"):
        model(**batch, labels=labels)

"""Qwen2-VL's host prologue against transformers' own functions, its refusals, its names and its config."""

from __future__ import annotations

import json

import matrix
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILY, IMAGE, make_batch
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from vlmbuild.errors import BatchError, SourceError

SIDES = st.sampled_from([2, 4, 6, 8, 10])
GRIDS = st.tuples(st.integers(1, 3), SIDES, SIDES)
VIDEOS = GRIDS.map(lambda grid: ("video", *grid))
SAMPLES = st.lists(st.one_of(st.integers(1, 6), GRIDS, VIDEOS), min_size=1, max_size=5)
LAYOUTS = st.lists(SAMPLES, min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(layout=LAYOUTS, side=st.sampled_from(["left", "right"]))
def test_positions_and_features_equal_transformers(layout, side, config, reference):
    batch, _ = make_batch(layout, side)
    prepared = FAMILY.prepare(batch, config)
    expected, _ = reference.model.get_rope_index(
        batch["input_ids"],
        batch["mm_token_type_ids"],
        batch.get("image_grid_thw"),
        batch.get("video_grid_thw"),
        batch["attention_mask"],
    )
    index = batch["attention_mask"].flatten().nonzero().squeeze(1)
    assert torch.equal(prepared.index, index)
    assert torch.equal(prepared.tensors["position_ids"], expected.flatten(1)[:, index].unsqueeze(1))
    assert torch.equal(prepared.tensors["input_ids"][0], batch["input_ids"].flatten()[index])
    lengths = batch["attention_mask"].sum(1).cumsum(0).tolist()
    assert prepared.tensors["text_cu_seqlens"].tolist() == [0, *lengths, lengths[-1]]
    media = batch["mm_token_type_ids"].flatten()[index]
    if prepared.variant == "text":
        assert not media.any()
        return
    features = prepared.tensors["feature_index"][0]
    images = int((media == 1).sum())
    assert torch.equal(features[media == 1], torch.arange(images))
    assert torch.equal(features[media == 2], images + torch.arange(int((media == 2).sum())))
    assert (features[media == 0] == -1).all()


def test_rows_without_tokens_and_short_ids_are_no_special_case(config):
    batch, _ = make_batch([[5, (1, 4, 6), 2], [4], [3, ("video", 2, 2, 4)]])
    expected = FAMILY.prepare({key: batch[key] for key in batch}, config).tensors["position_ids"]
    lengths = batch["attention_mask"].sum(1)
    batch["attention_mask"][1] = 0
    batch["input_ids"] = batch["input_ids"].int()
    found = FAMILY.prepare(batch, config).tensors["position_ids"]
    kept = torch.ones(int(lengths.sum()), dtype=torch.bool)
    kept[int(lengths[0]) : int(lengths[:2].sum())] = False
    assert torch.equal(found, expected[:, :, kept]) and found.dtype == torch.int64


@settings(max_examples=40, deadline=None)
@given(layout=LAYOUTS.filter(lambda layout: any(not isinstance(part, int) for sample in layout for part in sample)))
def test_vision_inputs_equal_transformers(layout, config):
    batch, _ = make_batch(layout)
    tensors = FAMILY.prepare(batch, config).tensors
    grids = torch.cat([batch[key] for key in ("image_grid_thw", "video_grid_thw") if key in batch])
    pixels = torch.cat([batch[key] for key in ("pixel_values", "pixel_values_videos") if key in batch])
    count = len(pixels)
    assert torch.equal(tensors["pixel_values"][:count], pixels)
    assert torch.equal(tensors["vision_position_ids"][:count], get_vision_position_ids(grids, 2))
    bounds = get_vision_cu_seqlens(grids).tolist()
    second = [8] if count == 4 else []  # an image that keeps a single feature from being a special case
    assert tensors["vision_cu_seqlens"].tolist() == [*bounds, *second, (bounds + second)[-1]]
    assert len(tensors["pixel_values"]) == max(count, 8)


def broken(change, layout=((5, (1, 4, 6), 7, (1, 8, 2), 3), (9, (1, 2, 2), 4))):
    batch, _ = make_batch(layout)
    change(batch)
    return batch


def cut(batch):
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        batch[key] = batch[key][:, :16]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, r"Sample 0: image 1 \(grid 1 x 8 x 2\) has 4 features, but the text holds 0|image 1 .* has 4 features"),
        (
            lambda b: b["input_ids"][0, 6:8].fill_(5),
            r"Sample 0: image 0 \(grid 1 x 4 x 6\) has 6 features, but .* 4 image",
        ),
        (lambda b: b["input_ids"][1, 10:11].fill_(5), r"image 2 \(grid 1 x 2 x 2\) has 1 features but no image tokens"),
        (lambda b: b["input_ids"][1, 1].fill_(IMAGE), r"image 2 .* has 1 features, but|Sample 1 has 1 image tokens"),
        (lambda b: b.pop("pixel_values"), "has images but no pixel_values"),
        (lambda b: b.pop("image_grid_thw"), "has images but no image_grid_thw"),
        (lambda b: (b.pop("pixel_values"), b.pop("image_grid_thw")), "Sample 0 has 10 image tokens .* no image"),
        (lambda b: b.update(pixel_values=b["pixel_values"][:-4]), "the grids of the 3 images .* need 44 patches"),
        (lambda b: b.update(pixel_values=b["pixel_values"][:, :588]), r"shape \(44, 588\).* 44 patches of 1176 values"),
        (lambda b: b["input_ids"][0, 12].fill_(IMAGE), "image 0 .* has 6 features, but the text holds 7 image tokens"),
        (lambda b: b["image_grid_thw"][0, 1].fill_(3), "image 0: grid 1 x 3 x 6 is not made of 2 x 2 blocks"),
    ],
)
def test_bad_batch_is_named(change, message, config):
    with pytest.raises(BatchError, match=message):
        FAMILY.prepare(broken(change), config)


def test_leftover_video_is_named(config):
    batch = broken(lambda b: b["input_ids"][0, 4:10].fill_(5), [[3, ("video", 1, 4, 6), 2], [2, (1, 2, 2)]])
    with pytest.raises(BatchError, match=r"video 0 \(grid 1 x 4 x 6\) has 6 features but no video tokens"):
        FAMILY.prepare(batch, config)


def test_truncation_says_what_to_do(config):
    with pytest.raises(BatchError, match="truncation.*longest_edge.*max_length|max_length"):
        FAMILY.prepare(broken(cut), config)


def test_flat_and_nested_configs_are_the_same():
    nested = tiny.config_values()
    ours, theirs = FAMILY.config(nested), FAMILY.config(json.loads(json.dumps(tiny.flat(nested))))
    assert ours.text_config.rope_parameters["mrope_section"] == theirs.text_config.rope_parameters["mrope_section"]
    assert FAMILY.geometry(ours) == FAMILY.geometry(theirs)
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert getattr(ours.text_config, key) == getattr(theirs.text_config, key)


def changed(part, **changes):
    values = tiny.config_values()
    values[part] = values[part] | changes
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            changed("text_config", rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
            "mrope_section None must",
        ),
        (changed("text_config", rope_parameters={"rope_type": "default", "mrope_section": [1, 2, 3]}), "64 angles"),
        (changed("text_config", use_sliding_window=True, sliding_window=0), "sliding_window 0 must be a whole number"),
        (changed("vision_config", depth=None), "not a valid"),
    ],
)
def test_configs_that_would_be_captured_wrongly_are_refused(values, message):
    with pytest.raises(SourceError, match=message):
        FAMILY.config(values)


def test_labels_on_placeholders_are_refused(config):
    batch, _ = make_batch([[5], [3, (1, 4, 6), 2], [("video", 2, 4, 4), 6]])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with pytest.raises(BatchError, match=r"Sample 1: 6 labels are the image token \(318\).*labels == 318\] = -100"):
        FAMILY.prepare({**batch, "labels": labels}, config)
    labels[labels == IMAGE] = -100
    with pytest.raises(BatchError, match=r"Sample 2: 8 labels are the video token"):
        FAMILY.prepare({**batch, "labels": labels}, config)


def test_batch_of_a_processor_with_higher_pixel_limits_is_refused(config):
    setup = matrix.SETUPS["qwen2_vl"](False)
    higher = matrix.replace(setup, processor=matrix.SETUPS["qwen2_vl"](True).processor)
    photo = matrix.photographs()["retina"]
    config = setup.config()
    made, _ = matrix.batch(higher, [["Look", photo]], "right")
    with pytest.raises(BatchError, match="image 0 .* pixels, but the model's processor allows 62,720"):
        FAMILY.prepare(made, config, setup.processor)
    for processor, inputs in (
        (higher.processor, made),
        (setup.processor, matrix.batch(setup, [["Look", photo]], "right")[0]),
    ):
        FAMILY.prepare(inputs, config, processor)
    for size in ((2000, 30), (30, 2000)):  # sides of one feature break the limit by themselves
        made, _ = matrix.batch(setup, [["Look", photo.resize(size)]], "right")
        FAMILY.prepare(made, config, setup.processor)

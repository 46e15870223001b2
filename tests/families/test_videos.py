"""Videos and images in one batch, from frames, without torchvision: the processor, and parity with transformers."""

from __future__ import annotations

import matrix
import numpy as np
import pytest
import torch
from parity import MODEL_FP32
from processors import photographs
from transformers.utils.import_utils import is_torchvision_available
from videos import pan, text_of

from vlmbuild.families import FAMILIES
from vlmbuild.families.qwen2_vl.processor import FrameProcessor

FRAMES = {name: getattr(family, "frame_processor", None) for name, family in FAMILIES.items()}
WITH_VIDEOS = [name for name, kind in FRAMES.items() if kind is not None and kind.frame_class is FrameProcessor]
"""Families whose frames are sized one by one."""


@pytest.fixture(scope="module", params=WITH_VIDEOS)
def setup(request):
    return matrix.tiny(request.param)


SIZE = {"shortest_edge": 28 * 28, "longest_edge": 112 * 84}


def test_frames_become_pairs_of_patches(setup):
    images = setup.processor.image_processor
    frames = pan(4)
    made = FrameProcessor(images)([frames], return_tensors="pt", size=SIZE)
    assert made["video_grid_thw"].tolist() == [[2, 6, 8]]
    alone = [images([frame], return_tensors="pt", size=SIZE)["pixel_values"].view(48, 3, 2, 196) for frame in frames]
    pixels = made["pixel_values_videos"].view(2, 48, 3, 2, 196)
    for number, frame in enumerate(alone):
        assert torch.equal(pixels[number // 2, :, :, number % 2], frame[:, :, 0])
    assert not torch.equal(alone[0], alone[1])


def test_odd_counts_repeat_the_last_frame_and_arrays_are_frames(setup):
    process = FrameProcessor(setup.processor.image_processor)
    three = process([pan(3)], return_tensors="pt", size=SIZE)
    four = process([[*pan(3), pan(3)[-1]]], return_tensors="pt", size=SIZE)
    array = process(np.stack([np.asarray(frame) for frame in pan(3)]), return_tensors="pt", size=SIZE)
    for key in ("pixel_values_videos", "video_grid_thw"):
        assert torch.equal(three[key], four[key])
        assert torch.equal(three[key], array[key])


def test_a_file_needs_torchvision(setup):
    with pytest.raises(ValueError, match=r"Decoding film.mp4 needs torchvision.*list of its frames"):
        FrameProcessor(setup.processor.image_processor)(["film.mp4"])


def test_saved_processor_has_the_stock_name_and_loads_again(setup, tmp_path):
    setup.processor.save_pretrained(tmp_path)
    assert "FrameProcessor" not in (tmp_path / "processor_config.json").read_text()
    loaded = setup.family.processor(tmp_path)
    assert isinstance(loaded.video_processor, FrameProcessor) != is_torchvision_available()
    options = {"text": [text_of(setup, "video")], "videos": [pan(2)], "return_tensors": "pt"}
    first, second = setup.processor(**options), loaded(**options)
    for key in first:  # torchvision resizes otherwise than Pillow
        tolerance = 0.2 if key == "pixel_values_videos" and is_torchvision_available() else 0.0
        torch.testing.assert_close(first[key], second[key], rtol=0.0, atol=tolerance)


def test_videos_images_and_text_in_one_batch_equal_transformers(setup):
    photo = photographs()
    texts = [
        text_of(setup, "Compare", "video", "with", "image", "and say which is older."),
        text_of(setup, "image", "Look!"),
        text_of(setup, "Name three planets and their moons, please."),
        text_of(setup, "video"),
    ]
    inputs = dict(
        setup.processor(
            text=texts,
            images=[photo["chelsea"].resize((90, 60)), photo["tall"].resize((30, 200))],
            videos=[pan(6), pan(3, (56, 112))],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            videos_kwargs={"size": SIZE, "video_metadata": [{"total_num_frames": n, "fps": n / 2} for n in (6, 3)]},
        )
    )
    assert inputs["video_grid_thw"].tolist() == [[3, 6, 8], [2, 8, 4]]
    if "second_per_grid_ts" in setup.family.input_layout:
        torch.testing.assert_close(inputs["second_per_grid_ts"], torch.tensor([2 / 3, 4 / 3]))
    counts = (inputs["input_ids"] == 151656).sum(1)
    assert counts.tolist() == [3 * 6 * 8 // 4, 0, 0, 2 * 8 * 4 // 4]
    whole = inputs["input_ids"]
    inputs["input_ids"] = setup.shrunk(whole)
    labels = inputs["input_ids"].masked_fill(
        (inputs["attention_mask"] == 0) | torch.isin(whole, torch.tensor([151655, 151656])), -100
    )
    labels[torch.arange(4), inputs["attention_mask"].argmax(1)] = -100
    theirs = matrix.reference(setup)
    found = matrix.errors(matrix.bind(setup, matrix.program(setup), theirs), theirs, inputs, labels)
    for what in ("logits", "loss", "gradient"):
        assert found[what] <= MODEL_FP32, (what, found)

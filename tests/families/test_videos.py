"""Videos and images in one batch, from frames and from files, without torchvision and with it: the processor, and parity with
transformers."""

from __future__ import annotations

import pickle
from functools import partial

import matrix
import numpy as np
import pytest
import torch
from parity import MODEL_FP32
from processors import photographs
from transformers import AutoProcessor
from transformers.utils.import_utils import is_torchvision_available
from transformers.video_utils import VideoMetadata, load_video
from videos import pan, text_of, write_mp4

from vlmbuild.families import FAMILIES
from vlmbuild.families.qwen2_vl.processor import FrameProcessor
from vlmbuild.families.videos import read_video
from vlmbuild.util.pixels import VARIABLE

ALL = [name for name, family in FAMILIES.items() if hasattr(family, "frame_processor")]
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


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A file of 10 frames, 5 a second, of a size that no processor here changes."""
    return write_mp4(tmp_path_factory.mktemp("clips") / "a clip.mp4", pan(10, (128, 96)), 5)


SAMPLINGS = ({"do_sample_frames": False}, {"fps": 2}, {"num_frames": 6})
LARGE = {"shortest_edge": 16, "longest_edge": 2**24}


def decoded(clip, processor, sampling):
    """Decode a file as transformers does; return the arguments that give these frames to a processor."""
    choose = None if "do_sample_frames" in sampling else partial(processor.sample_frames, **sampling)
    frames, facts = load_video(str(clip), backend="pyav", sample_indices_fn=choose)
    return {"videos": [frames], "video_metadata": [facts], "do_sample_frames": False}


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_file_equals_its_frames_as_transformers_decodes_them(name, sampling, clip):
    setup = matrix.tiny(name)
    process, text = setup.processor, [text_of(setup, "video", "What happens?")]
    wanted = {"do_sample_frames": True, **sampling}
    expected = process(
        text=text,
        **decoded(clip, process.video_processor, sampling),
        size=LARGE,
        return_metadata=True,
        return_tensors="pt",
    )
    for source in (str(clip), clip.as_uri()):
        made = process(text=text, videos=[source], size=LARGE, return_metadata=True, return_tensors="pt", **wanted)
        count = len(made["video_metadata"][0].frames_indices)
        assert count == {"do_sample_frames": 10, "fps": 4, "num_frames": 6}[next(iter(sampling))]
        assert made["video_metadata"][0].fps == 5
        for key in ("input_ids", "pixel_values_videos", "video_grid_thw"):
            assert torch.equal(made[key], expected[key]), key
        if "second_per_grid_ts" in expected:
            assert made["second_per_grid_ts"].tolist() == expected["second_per_grid_ts"].tolist()
            assert made["second_per_grid_ts"].tolist() == pytest.approx([2 / (count / 2)])


@pytest.mark.skipif(not is_torchvision_available(), reason="transformers' video processors need torchvision")
@pytest.mark.parametrize("name", ALL)
def test_with_torchvision_a_file_equals_what_the_stock_processor_makes_of_its_frames(name, clip, tmp_path):
    setup = matrix.tiny(name)
    setup.processor.save_pretrained(tmp_path)
    ours, stock = setup.family.processor(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(stock.video_processor).__name__ == type(ours.video_processor).__name__
    ours = pickle.loads(pickle.dumps(ours))
    text = [text_of(setup, "video")]
    for sampling in (*SAMPLINGS[:2], {"num_frames": 6, "fps": None}):  # the stock ones may have fps by default
        made = ours(text=text, videos=[str(clip)], return_tensors="pt", **{"do_sample_frames": True, **sampling})
        arguments = {"text": text, "return_tensors": "pt", **decoded(clip, stock.video_processor, sampling)}
        expected, pillow = stock(**arguments), setup.processor(**arguments)
        assert all(torch.equal(made[key], expected[key]) for key in expected)
        for key in expected.keys() & pillow.keys():
            tolerance = 0.3 if key == "pixel_values_videos" else 0.0  # torchvision resizes otherwise than Pillow
            torch.testing.assert_close(pillow[key], expected[key], rtol=0.0, atol=tolerance)
        chosen = [
            one.video_processor.sample_frames(VideoMetadata(total, fps=speed), **sampling).tolist()
            for total, speed in ((10, 5.0), (301, 29.97), (4000, 3.0))
            for one in (setup.processor, stock)
            if "do_sample_frames" not in sampling
        ]
        assert chosen[::2] == chosen[1::2]


def test_files_and_frames_in_one_batch(clip, setup):
    process = setup.processor.video_processor
    mixed = process([pan(4), str(clip), pan(2)], return_tensors="pt", size=SIZE)
    alone = [process([one], return_tensors="pt", size=SIZE) for one in (pan(4), str(clip), pan(2))]
    assert torch.equal(mixed["video_grid_thw"], torch.cat([one["video_grid_thw"] for one in alone]))
    assert torch.equal(mixed["pixel_values_videos"], torch.cat([one["pixel_values_videos"] for one in alone]))


def test_what_is_not_decoded(clip, tmp_path, monkeypatch):
    text, cut, stream = tmp_path / "notes.mp4", tmp_path / "cut.mp4", tmp_path / "endless.mkv"
    text.write_text("no video")
    data = clip.read_bytes()
    cut.write_bytes(data.replace(data[data.index(b"mdat") + 2000 : data.index(b"moov") - 500], b"", 1))
    write_mp4(stream, pan(3), 5)
    for source, said in (
        (tmp_path / "gone.mp4", "gone.mp4.*no such file"),
        ("https://example.com/clip.mp4", "address.*not downloaded"),
        (data, "bytes"),
        (text, "notes.mp4 cannot be decoded"),
        (cut, "cut.mp4"),
        (stream, "endless.mkv.*how many frames"),
    ):
        with pytest.raises(ValueError, match=said):
            read_video(source)
    longer = write_mp4(tmp_path / "longer.mp4", pan(11, (128, 96)), 5)
    for limit, source in ((128 * 96 - 1, clip), (128 * 96, longer)):  # a frame, and a video
        monkeypatch.setenv(VARIABLE, str(limit))
        with pytest.raises(ValueError, match=f"128 x 96 .*{limit:,}.*{VARIABLE}"):
            read_video(source)
    assert read_video(clip)[0].shape == (10, 96, 128, 3)

    def choose(**_):
        raise ValueError("num_frames and fps exclude each other")

    with pytest.raises(ValueError, match=r"a clip\.mp4: num_frames and fps exclude"):
        read_video(clip, choose)
    monkeypatch.setattr("vlmbuild.families.videos.is_av_available", lambda: False)
    with pytest.raises(ValueError, match="a clip.mp4 needs PyAV.*pip install av"):
        read_video(clip)

"""Images that cannot be processed: named with their sample, or left out on request; measuring and batching agree."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vlmbuild import PackedDataset, VisionDataCollator
from vlmbuild.demo.digits import Digits
from vlmbuild.errors import BatchError
from vlmbuild.families import FAMILIES
from vlmbuild.zoo import CHECKPOINTS, ZOO

GOOD = Digits("train", 7).take(1)[0].image
PROCESSORS = {name: FAMILIES[name].processor(ZOO[CHECKPOINTS[name]]) for name in CHECKPOINTS}


def sample(picture):
    messages = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "8"}]
    return {"messages": messages, "images": [picture]}


def bomb():
    """A small file of 144 megapixels."""
    stream = io.BytesIO()
    Image.new("1", (12000, 12000)).save(stream, "PNG")
    return stream.getvalue()


BAD = {
    "aspect ratio": Image.new("RGB", (3000, 10)),
    "no image": b"not a picture",
    "missing": "gone.png",
    "pixels": bomb(),
    "16 bits": Image.fromarray(np.full((40, 40), 40000, np.uint16)),
    "floats": np.full((40, 40), 0.5, np.float32),
    "four axes": np.zeros((1, 40, 40, 3), np.uint8),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_image_is_named_or_dropped(bad):
    data = [sample(GOOD), sample(BAD[bad]), sample(GOOD)]
    strict, lenient = (VisionDataCollator(PROCESSORS["qwen2_vl"], unusable=choice) for choice in ("error", "drop"))
    with pytest.raises(BatchError, match=r'Sample 1 \("Which\?"\)'):
        strict(data)
    with pytest.raises(BatchError, match="Sample 1 "):
        strict.measure(data[1], 1)
    with pytest.raises(BatchError, match="Sample 1 "):
        PackedDataset(data, strict, 200)
    with pytest.warns(UserWarning, match=r"1 of 3 samples left out\. Sample 1"):
        batch = lenient(data)
    expected = strict([data[0], data[2]])
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert not lenient.measure(data[1]).fits
    with pytest.warns(UserWarning, match="1 have an image that cannot be processed; the first is sample 1"):
        assert PackedDataset(data, lenient, 200).indices == [0, 2]
    with pytest.raises(BatchError, match="Sample 0"):
        lenient(data[1:2])


@pytest.mark.parametrize("name", PROCESSORS)
def test_grey_and_transparent_images_are_colour_images(name):
    grey = np.asarray(GOOD.convert("L"))
    alpha = np.asarray(GOOD.convert("RGBA"))
    collator = VisionDataCollator(PROCESSORS[name])
    expected = collator([sample(GOOD.convert("L").convert("RGB"))])
    for picture in (grey, grey[..., None], torch.from_numpy(grey.copy()), GOOD.convert("L")):
        batch = collator([sample(picture)])
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
        assert collator.measure(sample(picture)).tokens == batch["input_ids"].numel()
    assert torch.equal(collator([sample(alpha)])["pixel_values"], collator([sample(GOOD)])["pixel_values"])


def test_the_limit_on_pixels_can_be_raised_and_lowered(monkeypatch, tmp_path):
    collator = VisionDataCollator(PROCESSORS["qwen2_vl"])
    GOOD.save(tmp_path / "good.png")
    for picture in (GOOD, str(tmp_path / "good.png")):
        monkeypatch.setenv("VLMBUILD_MAX_PIXELS", "999")
        for call in (lambda one: collator([one]), collator.measure):
            with pytest.raises(BatchError, match="Sample 0.*more than 999.*VLMBUILD_MAX_PIXELS"):
                call(sample(picture))
        monkeypatch.setenv("VLMBUILD_MAX_PIXELS", str(10**9))
        collator([sample(picture)])


def test_a_bad_frame_of_a_video_is_named():
    example = {**sample(None), "images": None, "videos": [[GOOD, "gone.png"]]}
    with pytest.raises(BatchError, match=r"Sample 0 .*gone\.png"):
        VisionDataCollator(PROCESSORS["qwen2_vl"])([example])
    with pytest.raises(BatchError, match="Sample 0 .*film.mp4"):
        VisionDataCollator(PROCESSORS["qwen2_vl"])([{**example, "videos": ["film.mp4"]}])

"""Video files in chats: the collator reads them as the processor does, and names the sample and the file that it cannot read."""

from __future__ import annotations

import pytest
import torch
from transformers.video_utils import load_video
from videos import pan, write_mp4

from vlmbuild import VisionDataCollator
from vlmbuild.errors import BatchError
from vlmbuild.families import FAMILIES
from vlmbuild.runtime.torch.loss import IGNORED
from vlmbuild.zoo import ZOO

COLLATOR = VisionDataCollator(FAMILIES["qwen2_vl"].processor(ZOO["qwen2-vl-digits"]))


def sample(**video):
    content = [{"type": "video", **video}, {"type": "text", "text": "Which?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "8"}]}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_mp4(tmp_path_factory.mktemp("clips") / "clip.mp4", pan(10, (112, 84)), 5)


def test_a_file_is_read_as_its_frames(clip):
    frames = load_video(str(clip), backend="pyav")[0]
    expected = COLLATOR([sample(video=list(frames)), sample(video=pan(3))])
    assert expected["video_grid_thw"][:, 0].tolist() == [5, 2]
    columns = {**sample(), "videos": [clip]}
    for first in (sample(video=str(clip)), sample(path=clip), sample(url=clip.as_uri()), columns):
        batch = COLLATOR([first, sample(video=pan(3))])
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
        assert COLLATOR.measure(first).tokens == int(batch["attention_mask"][0].sum())


def test_frames_of_a_file_are_chosen(clip):
    for choice, pairs in (({"fps": 2}, 2), ({"num_frames": 6}, 3)):
        batch = COLLATOR([sample(video=str(clip), **choice)])
        assert batch["video_grid_thw"][0, 0] == pairs
        assert COLLATOR.measure(sample(video=str(clip), **choice)).tokens == batch["input_ids"].shape[1]


def test_times_between_frames_are_never_learned():
    """Qwen3-VL's processor writes them into the text."""
    processor = FAMILIES["qwen3_vl"].processor(ZOO["qwen3-vl-digits"])
    first, second = sample(video=pan(10)), sample(video=pan(9))
    more = ({"type": "text", "text": "or"}, {"type": "image", "image": pan(1)[0]}, {"type": "video", "video": pan(2)})
    first["messages"][0]["content"] += more
    texts = [processor.apply_chat_template(one["messages"]) for one in (first, second)]
    media = {"images": [pan(1)], "videos": [pan(10), pan(2), pan(9)]}
    own = processor(text=list(texts), **media, padding=True, padding_side="right", return_tensors="pt")
    assert own["video_grid_thw"][:, 0].tolist() == [2, 1, 2]
    for only in (True, False):
        collator = VisionDataCollator(processor, responses_only=only)
        batch = collator([first, second])
        assert all(torch.equal(batch[key], own[key]) for key in batch.keys() - {"labels"})
        for one, text, labels, mask in zip(
            (first, second), texts, batch["labels"], batch["attention_mask"], strict=True
        ):
            ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
            written = ids[~torch.isin(ids, collator.media)]
            assert torch.equal(labels[labels != IGNORED], written[-3:-1] if only else written)
            assert collator.measure(one).tokens == int(mask.sum()) > len(ids) + 9
    first["messages"][0]["content"][1]["text"] = "<|vision_start|>8<|vision_end|>"
    with pytest.raises(BatchError, match="Sample 0.*texts without tokens of images"):
        VisionDataCollator(processor)([first])


@pytest.mark.parametrize(
    ("video", "said"),
    [
        ({"video": "gone.mp4"}, "gone.mp4.*no such file"),
        ({"url": "https://example.com/clip.mp4"}, "https://example.com/clip.mp4"),
        ({"video": b"0000"}, "bytes"),
        ({"video": pan(4), "fps": 2}, "fps"),
    ],
)
def test_a_video_that_cannot_be_read_is_named_or_dropped(video, said):
    with pytest.raises(BatchError, match=rf'Sample 1 \("Which\?"\).*{said}'):
        COLLATOR([sample(video=pan(2)), sample(**video)])
    lenient = VisionDataCollator(COLLATOR.processor, unusable="drop")
    with pytest.warns(UserWarning, match="1 of 2 samples left out"):
        lenient([sample(video=pan(2)), sample(**video)])

"""Forms of samples that other tools write, each compared with the prompt that it means; what is not understood is named."""

from __future__ import annotations

import base64
import copy
import io

import pytest
import torch

from vlmbuild import VisionDataCollator
from vlmbuild.demo.digits import Digits
from vlmbuild.errors import BatchError, UsageError
from vlmbuild.families import FAMILIES
from vlmbuild.zoo import CHECKPOINTS, ZOO

IMAGES = [sample.image for sample in Digits("train", 7).take(3)]
ANSWER = {"role": "assistant", "content": "8"}
QWEN = FAMILIES["qwen2_vl"].processor(ZOO["qwen2-vl-digits"])


@pytest.fixture(scope="module", params=CHECKPOINTS)
def processor(request):
    return FAMILIES[request.param].processor(ZOO[CHECKPOINTS[request.param]])


def image(picture=None):
    return {"type": "image"} if picture is None else {"type": "image", "image": picture}


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def sample(question="Largest?", **columns):
    return {"messages": [{"role": "user", "content": question}, ANSWER], **columns}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def learned(batch, row=0):
    return QWEN.tokenizer.decode(batch["labels"][row][batch["labels"][row] != -100])


# Media --------------------------------------------------------------------------------------------------------------

MEANT = {
    "messages": [
        user(image(IMAGES[0]), text("\nWho?")),
        ANSWER,
        user(text("And "), image(IMAGES[1]), text(" here?")),
        {"role": "assistant", "content": "9"},
    ]
}


def png(picture):
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream


def address(picture):
    return f"data:image/png;base64,{base64.b64encode(png(picture).getvalue()).decode()}"


@pytest.fixture
def forms(tmp_path):
    """MEANT as other tools have it."""
    path = tmp_path / "a picture.png"
    IMAGES[0].save(path)
    tagged = [
        {"role": "user", "content": "<image>\nWho?"},
        ANSWER,
        {"role": "user", "content": "And <image> here?"},
        {"role": "assistant", "content": "9"},
    ]
    speakers = {"user": "human", "assistant": "gpt"}
    in_parts = copy.deepcopy(MEANT["messages"])
    in_parts[0]["content"][0] = {"type": "image_url", "image_url": {"url": address(IMAGES[0]), "detail": "auto"}}
    in_parts[2]["content"][1] = {"type": "image_url", "image_url": address(IMAGES[1])}
    in_files = copy.deepcopy(MEANT["messages"])
    in_files[0]["content"][0] = {"type": "image", "url": path.as_uri()}
    in_files[2]["content"][1] = {"type": "image", "image": png(IMAGES[1])}
    return {
        "ms-swift": {"messages": tagged, "images": IMAGES[:2]},
        "LLaVA": {
            "conversations": [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in tagged],
            "images": IMAGES[:2],
            "messages": None,
        },
        "tags in parts": {
            "messages": [{"role": turn["role"], "content": [text(turn["content"])]} for turn in tagged],
            "images": IMAGES[:2],
        },
        "OpenAI": {"messages": in_parts},
        "files": {"messages": in_files},
        "bare": copy.deepcopy(MEANT["messages"]),
    }


def test_formats_of_other_tools_mean_the_same_prompt(processor, forms):
    collator = VisionDataCollator(processor)
    expected = collator([MEANT])
    for name, form in forms.items():
        assert equal(collator([form]), expected), name
        assert collator.measure(form) == collator.measure(MEANT), name
    assert equal(collator([[form] for form in (forms["bare"], forms["OpenAI"])]), collator([MEANT, MEANT]))


def test_a_tag_may_be_meant_as_a_word():
    batch = VisionDataCollator(QWEN, tags=False)([sample("The tag <image>?")])
    assert "The tag <image>?" in QWEN.tokenizer.decode(batch["input_ids"][0])


def video(frames):
    return {"type": "video", "video": frames}


def test_videos_are_the_processors():
    frames = [picture.resize((56, 84)) for picture in IMAGES]
    collator = VisionDataCollator(QWEN)
    parts = {"messages": [user(text("See "), video(frames), text(" and "), image(IMAGES[0])), ANSWER]}
    column = sample("See <video> and <image>", videos=[frames], images=IMAGES[:1])
    without = sample("Why?", video=frames)
    batch = collator([parts, without])
    assert equal(collator([column, without]), batch)
    written = [
        QWEN.apply_chat_template(parts["messages"]),
        QWEN.apply_chat_template([user(video(frames), text("Why?")), ANSWER]),
    ]
    expected = QWEN(
        text=written,
        images=[IMAGES[:1]],
        videos=[frames, frames],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    assert equal({key: value for key, value in batch.items() if key != "labels"}, dict(expected))
    assert learned(batch) == "8<|im_end|>"
    assert collator.measure(parts).tokens == int(batch["attention_mask"][0].sum())


@pytest.mark.parametrize("name", ["mllama", "pixtral"])
def test_models_without_videos_refuse_them(name):
    other = FAMILIES[name].processor(ZOO[CHECKPOINTS[name]])
    with pytest.raises(BatchError, match="Sample 0 .* 1 videos, but .* reads none|chat template"):
        VisionDataCollator(other)([sample("See", videos=[IMAGES])])


@pytest.mark.parametrize(
    ("limits", "grid"),
    [
        ({}, [1, 16, 16]),
        ({"max_pixels": 4 * 28 * 28}, [1, 4, 4]),
        ({"resized_height": 56, "resized_width": 112}, [1, 4, 8]),
        ({"min_pixels": 40 * 28 * 28, "max_pixels": 50 * 28 * 28}, [1, 14, 14]),
    ],
)
def test_limits_of_an_image(limits, grid):
    big = IMAGES[0].resize((560, 560))
    collator = VisionDataCollator(QWEN)
    example = {"messages": [user({**image(big), **limits}, text("?")), ANSWER]}
    batch = collator([example])
    assert batch["image_grid_thw"].tolist() == [grid]
    assert collator.measure(example).tokens == batch["input_ids"].numel()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_pixels": 10**9, "min_pixels": 10**8}, "processor allows 3136 to 50176"),
        ({"resized_height": 28, "resized_width": 28}, "28 x 28 is what it asks for"),
        ({"resized_height": 56}, "do not go together"),
        ({"resized_height": 56, "resized_width": 56, "max_pixels": 3136}, "do not go together"),
        ({"max_pixels": 0}, "max_pixels must be"),
        ({"min_pixels": 9999, "max_pixels": 3136}, "min_pixels 9999 is above"),
        ({"detail": "low"}, "'detail' .low."),
        ({"fps": 2}, "'fps'"),
        ({"path": "x.png"}, "one image part has 2"),
    ],
)
def test_limits_that_cannot_be_met_are_named(limits, message):
    example = {"messages": [user({**image(IMAGES[0]), **limits}, text("Which?")), ANSWER]}
    with pytest.raises(BatchError, match=f"Sample 1.*{message}"):
        VisionDataCollator(QWEN)([sample(), example])


def test_models_without_limits_of_single_images_refuse_them():
    other = FAMILIES["pixtral"].processor(ZOO["pixtral-digits"])
    example = {"messages": [user({**image(IMAGES[0]), "max_pixels": 9999}, text("?")), ANSWER]}
    with pytest.raises(BatchError, match="Sample 0.*max_pixels: Pixtral has no limits"):
        VisionDataCollator(other)([example])


# Weights ------------------------------------------------------------------------------------------------------------


def weighted(**flags):
    bad = {"role": "assistant", "content": "BAD", **flags}
    return {
        "messages": [{"role": "user", "content": "Hi", "weight": None}, bad, {"role": "user", "content": "?"}, ANSWER]
    }


@pytest.mark.parametrize("flags", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False, "weight": 0}])
def test_turns_of_weight_zero_are_read_not_learned(flags, processor):
    batch = VisionDataCollator(processor)([weighted(**flags)])
    label = batch["labels"][0]
    whole = VisionDataCollator(processor)([weighted()])["labels"][0]
    learned, all_learned = (processor.tokenizer.decode(each[each != -100]).lstrip() for each in (label, whole))
    assert learned.startswith("8") and all_learned.startswith("BAD")  # SmolVLM's template writes a space before them
    everything = VisionDataCollator(processor, responses_only=False)
    (found,), (plain,) = everything([weighted(**flags)])["labels"], everything([weighted()])["labels"]
    assert torch.equal(found != plain, (whole != -100) & (label == -100))


@pytest.mark.parametrize("flags", [{"weight": 1}, {"train": True}, {"weight": 1.0, "train": True}, {"weight": None}])
def test_turns_of_weight_one_are_learned(flags):
    collator = VisionDataCollator(QWEN)
    assert equal(collator([weighted(**flags)]), collator([weighted()]))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (weighted(weight=0.5), "weight 0.5"),
        (weighted(weight="0"), "weight '0'"),
        (weighted(weight=0, train=True), "contradict"),
        (weighted(cost=0), "'cost', which would be lost"),
        ({"messages": [user(text("Hi")), {**ANSWER, "role": "asistant"}, ANSWER]}, "from 'asistant'.*assistant"),
        (
            sample() | {"messages": [{"role": "user", "content": "Hi", "weight": 1}, ANSWER]},
            "role user has a weight of 1",
        ),
        ({"messages": [user(text("Hi")), {**ANSWER, "weight": 0}]}, "no response to learn.*weight of 0"),
        (
            {"prompt": [user(text("Hi")), {**ANSWER, "train": True}], "completion": [ANSWER]},
            "of the prompt has a weight",
        ),
    ],
)
def test_messages_that_are_not_understood_are_named(messages, message):
    with pytest.raises(BatchError, match=f"Sample 0.*{message}"):
        VisionDataCollator(QWEN)([messages])


# Columns ------------------------------------------------------------------------------------------------------------


def with_tools(processor):
    processor = copy.copy(processor)
    processor.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% if mood %}{{ mood }}{% endif %}" + processor.chat_template
    )
    return processor


def test_system_tools_and_options_go_to_the_template():
    tools = [{"type": "function", "function": {"name": "f"}}]
    batch = VisionDataCollator(with_tools(QWEN))(
        [sample("Hi", system="Speak French.", tools=tools, chat_template_kwargs={"mood": "Glad.", "other": None})]
    )
    written = QWEN.tokenizer.decode(batch["input_ids"][0])
    assert written.startswith('[{"type": "function", "function": {"name": "f"}}]Glad.<|im_start|>system\nSpeak French.')
    as_text = sample("Hi", system="Speak French.", tools='[{"type": "function", "function": {"name": "f"}}]')
    options = {"template_options": {"mood": "Glad."}}
    assert equal(VisionDataCollator(with_tools(QWEN), **options)([as_text]), batch)
    assert learned(batch) == "8<|im_end|>"


SYSTEM = [{"role": "system", "content": "A"}, *sample()["messages"]]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (sample(tools=[{"name": "f"}]), "has tools, but the chat template does not write them"),
        (sample(tools="not JSON"), '"tools" must be a list'),
        (sample(chat_template_kwargs={"enable_thinking": False}), "does not read 'enable_thinking'"),
        (sample(chat_template_kwargs=3), '"chat_template_kwargs" must be a mapping'),
        (sample(audio=b"x"), "a column 'audio', which would be lost"),
        (sample(id=0), r"a column 'id'.*ignore_columns=\['id'\]"),
        (sample(images=IMAGES[:1], image=IMAGES[0]), '"images" and "image"'),
        (sample(conversations=[]), "messages and conversations: two conversations"),
        (sample(prompt=[]), "messages and prompt: two conversations"),
        ({"messages": SYSTEM, "system": "B"}, 'column "system"'),
        ({"conversations": [{"from": "bird", "value": "Hi"}]}, "from 'bird'"),
        (sample("<image>Who?"), "1 image placeholders .* 0 images"),
        (sample("<image>Who?", images=IMAGES[:2]), "1 image placeholders .* 2 images"),
        (sample("<video>Who?", images=IMAGES[:1]), "1 images beside|1 video placeholders"),
        ({"messages": [user(image(IMAGES[0]), text("<image>?")), ANSWER]}, "tags=False"),
        ({"messages": [user({"type": "text", "text": "?", "cache_control": {"x": 1}}), ANSWER]}, "'cache_control'"),
        ({"messages": [user({"type": "audio", "audio": "x"}), ANSWER]}, "a content part must be .*audio"),
    ],
)
def test_columns_and_keys_that_nobody_reads_are_named(example, message):
    with pytest.raises(BatchError, match=f"Sample 0.*{message}"):
        VisionDataCollator(QWEN)([example])


def test_columns_are_ignored_on_request():
    collator = VisionDataCollator(QWEN, ignore_columns=["id", "tools"])
    assert equal(collator([sample(id=7, tools=[{"name": "f"}])]), VisionDataCollator(QWEN)([sample()]))


def test_messages_that_a_template_drops_are_named():
    processor = copy.copy(QWEN)
    processor.chat_template = processor.chat_template.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    with pytest.raises(BatchError, match="Sample 0.*does not write the system message 'Speak French.'"):
        VisionDataCollator(processor)([sample(system="Speak French.")])


def test_options_that_the_template_does_not_read_are_named():
    with pytest.raises(UsageError, match="does not read 'mood'"):
        VisionDataCollator(QWEN, template_options={"mood": "x"})

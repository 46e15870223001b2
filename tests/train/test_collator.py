"""Batches of chat samples: labels, truncation, padding and images, with the families' real processors and photographs."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from PIL import Image
from processors import photographs
from samples import in_parts, one_image, text_only, turn, two_images
from setups import PROCESSORS, SETUPS

from vlmbuild import VisionDataCollator
from vlmbuild.errors import BatchError, UsageError
from vlmbuild.families import FAMILIES, family_of_processor
from vlmbuild.zoo import ZOO


@pytest.fixture(params=PROCESSORS)
def name(request):
    return request.param


@pytest.fixture
def processor(name):
    return PROCESSORS[name]()


def learned(processor, batch):
    """Decode each sample's labels."""
    return [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]


def test_labels_are_all_responses_with_their_ends(name, processor):
    batch = VisionDataCollator(processor)([text_only(), one_image(), two_images()])
    setup = SETUPS[name](False)
    lead, end = setup.lead, setup.end
    assert learned(processor, batch) == [
        f"{lead}Mars, Venus and Earth.{end}",
        f"{lead}A cat.{end}",
        f"{lead}One is a cup.{end}{lead}The sky at night.{end}",
    ]
    chosen = batch["labels"] != -100
    assert torch.equal(batch["labels"][chosen], batch["input_ids"][chosen])


def test_the_rest_is_what_the_processor_returns(name, processor):
    example = two_images()
    batch = VisionDataCollator(processor)([example])
    text = processor.apply_chat_template(in_parts(example["messages"]))
    expected = processor(text=[text], images=[example["images"]], add_special_tokens=False, return_tensors="pt")
    assert batch.keys() == {*expected.keys(), "labels"}
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key
        assert batch[key].dtype == value.dtype, key


def test_all_text_is_learned_on_request_but_media_and_padding(name, processor):
    batch = VisionDataCollator(processor, responses_only=False)([text_only(), two_images()])
    family = family_of_processor(processor)
    media = torch.tensor(sorted(family.media_tokens(processor)))
    written = family.is_media(batch["input_ids"], media, processor.image_token_id)
    ignored = written | (batch["attention_mask"] == 0)
    assert ignored.any()
    assert torch.equal(batch["labels"] == -100, ignored)


def test_forms_of_samples_are_equal(processor):
    picture, question, answer = photographs()["rocket"], "What is this?", turn("assistant", "A rocket.")
    bare = [{"type": "image", "text": None}, {"type": "text", "text": question, "image": None}]  # as tables have it
    forms = [
        {"messages": [turn("user", picture, question), answer]},
        {"messages": [{"role": "user", "content": bare}, answer], "images": [picture]},
        {"messages": [{"role": "user", "content": bare}, answer], "image": picture},
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "A rocket."}],
            "images": [picture],
        },
        {"prompt": [turn("user", picture, question)], "completion": [answer], "images": None},
    ]
    collator = VisionDataCollator(processor)
    first, *others = [collator([form]) for form in forms]
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


def test_images_by_path_are_upright(processor, tmp_path):
    picture = photographs()["rocket"].resize((300, 200))
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: the file is 300 x 200, the picture 200 x 300
    picture.save(tmp_path / "turned.png", exif=exif)
    collator = VisionDataCollator(processor)
    by_path = {"messages": [turn("user", "?", tmp_path / "turned.png"), turn("assistant", "!")]}
    given = {"messages": [turn("user", "?", picture.rotate(-90, expand=True)), turn("assistant", "!")]}
    assert torch.equal(collator([by_path])["pixel_values"], collator([given])["pixel_values"])
    assert collator.measure(by_path) == collator.measure(given)


def test_only_the_completion_is_learned(name, processor):
    prompt = [turn("user", "Hi."), turn("assistant", "Hello."), turn("user", "Bye.")]
    batch = VisionDataCollator(processor)([{"prompt": prompt, "completion": [turn("assistant", "Farewell.")]}])
    setup = SETUPS[name](False)
    assert learned(processor, batch) == [f"{setup.lead}Farewell.{setup.end}"]


def test_padding_on_the_left_is_the_processors(processor):
    examples = [text_only(), two_images(), one_image()]
    right, left = (VisionDataCollator(processor, padding_side=side)(examples) for side in ("right", "left"))
    asked = [
        processor.apply_chat_template(in_parts(VisionDataCollator(processor)._samples([e])[0].conversation.messages))
        for e in examples
    ]
    images = [[], examples[1]["images"], [photographs()["chelsea"]]]
    expected = processor(
        text=asked, images=images, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
    )
    for key, value in expected.items():
        assert torch.equal(left[key], value), key
    for row, length in enumerate(left["attention_mask"].sum(1).tolist()):
        assert torch.equal(left["labels"][row, -length:], right["labels"][row, :length])


def test_truncation_cuts_the_end_of_the_text_only(name, processor):
    long = one_image(answer="word " * 400)
    whole = VisionDataCollator(processor)([long, text_only()])
    length = int((whole["labels"][0] != -100).int().argmax()) + 40
    collator = VisionDataCollator(processor, max_length=length)
    with pytest.warns(UserWarning, match=rf'Sample 0 \(".*end of a response.*max_length {length}'):
        cut = collator([long, text_only()])
    assert cut["input_ids"].shape[1] <= length
    assert torch.equal(cut["input_ids"][0], whole["input_ids"][0, :length])
    assert int((cut["labels"][0] != -100).sum()) == 40
    assert all(torch.equal(cut[key], whole[key]) for key in cut if key.startswith(("pixel", "image", "aspect")))


def test_overlong_samples_are_errors_or_left_out(processor):
    """The second one's response begins beyond the limit."""
    question = turn("user", photographs()["wide"].resize((100, 30)), "word " * 300)
    examples = [text_only(), {"messages": [question, turn("assistant", "Yes.")]}]
    needed = int((VisionDataCollator(processor)(examples)["labels"][1] != -100).int().argmax()) + 1
    VisionDataCollator(processor, max_length=needed)(examples)
    with pytest.raises(BatchError, match=rf'Sample 1 \("word .*needs {needed} .*max_length is {needed - 1}\. Raise'):
        VisionDataCollator(processor, max_length=needed - 1)(examples)
    short = VisionDataCollator(processor, max_length=needed - 1, overlong="drop")
    with pytest.warns(UserWarning, match=r"1 of 2 samples left out\. Sample 1"):
        batch = short(examples)
    expected = VisionDataCollator(processor)(examples[:1])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    with pytest.raises(BatchError, match="Nothing is left"):
        short(examples[1:])


@pytest.mark.parametrize("max_tokens", [None, 300])
def test_measure_is_what_the_batch_has(processor, max_tokens):
    collator = VisionDataCollator(processor, max_length=max_tokens, overlong="drop")
    for example in (
        text_only(),
        one_image("astronaut"),
        one_image("wide", answer="word " * 300),
        two_images("chelsea"),
    ):
        tokens, images, fits = collator.measure(example)
        try:
            batch = collator([example])
        except BatchError:
            assert tokens == max_tokens
            assert not fits
            continue
        assert fits
        assert (tokens, images) == (
            batch["input_ids"].numel(),
            len(example.get("images", [])) or "pixel_values" in batch,
        )


def test_a_token_across_the_beginning_of_a_response_is_no_label():
    """Qwen's prompt ends with a line break, which becomes one token with a response's own."""
    processor = PROCESSORS["qwen2_vl"]()
    batch = VisionDataCollator(processor)([text_only(answer="\nYes.")])
    merged = processor.tokenizer("\n\n").input_ids
    assert len(merged) == 1
    place = int((batch["labels"][0] != -100).int().argmax())
    assert batch["input_ids"][0, place - 1] == merged[0]
    assert learned(processor, batch) == ["Yes.<|im_end|>"]


def test_templates_that_rewrite_history_are_refused():
    """Pixtral's writes the system message into the last user message, and drops it once an answer follows."""
    messages = [turn("system", "Be brief."), *text_only()["messages"]]
    with pytest.raises(BatchError, match="Sample 0 .* system message 'Be brief.' .* first user message"):
        VisionDataCollator(PROCESSORS["pixtral"]())([{"messages": messages}])


def test_a_system_message_is_read_not_learned():
    messages = [turn("system", "Be brief."), *text_only()["messages"]]
    for name in ("qwen2_vl", "mllama"):
        batch = VisionDataCollator(PROCESSORS[name]())([{"messages": messages}])
        assert "Be brief." in PROCESSORS[name]().tokenizer.decode(batch["input_ids"][0])
        assert learned(PROCESSORS[name](), batch) == [f"Mars, Venus and Earth.{SETUPS[name](False).end}"]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"text": "hello"}, 'Sample 0 has no "messages".*it has: text.*remove_unused_columns=False'),
        ("hello", "it has: str"),
        ({"messages": []}, 'has no "messages"'),
        ({"messages": [{"content": "x"}]}, "a message must be"),
        ({"messages": [{"role": "user", "content": None}]}, "content of the user message must be a string or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a content part must be .*audio"),
        ({"messages": [turn("user", "Hi.")]}, r'Sample 0 \("Hi."\) has no response to learn'),
        ({"messages": [turn("user", None), turn("assistant", "x")]}, "1 image placeholders without .*, and 0 images"),
        ({"messages": [turn("assistant", "x")], "images": [1]}, "no user message"),
        ({"messages": [turn("user", "?"), turn("assistant", "x")], "images": ["gone.png"]}, "gone.png cannot be read"),
    ],
)
def test_malformed_samples_are_named(processor, example, message):
    with pytest.raises(BatchError, match=message):
        VisionDataCollator(processor)([example])


def test_image_tokens_in_the_text_itself_are_refused(processor):
    example = {"messages": [turn("user", f"an {processor.image_token} here"), turn("assistant", "x")]}
    with pytest.raises(
        BatchError, match="has 0 images, but its text has 1 image tokens|has 1 image placeholders without"
    ):
        VisionDataCollator(processor)([example])


def test_template_refusals_name_the_sample():
    messages = [turn("user", "a"), turn("user", "b"), turn("assistant", "c")]
    with pytest.raises(BatchError, match=r'Sample 1 \("a"\): .*chat template refuses .*take turns'):
        VisionDataCollator(PROCESSORS["pixtral"]())([text_only(), {"messages": messages}])


def test_options_are_checked():
    processor = PROCESSORS["qwen2_vl"]()
    for options, message in (
        ({"max_length": 0}, "max_length"),
        ({"padding_side": "top"}, "padding_side"),
        ({"overlong": "cut"}, "overlong"),
        ({"size": {"depth": 3}}, "'depth' cannot be set"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            VisionDataCollator(processor, **options)
    with pytest.raises(UsageError, match="no padding token"):
        unpadded = copy.copy(processor)
        unpadded.tokenizer = copy.deepcopy(processor.tokenizer)
        unpadded.tokenizer.pad_token = None
        VisionDataCollator(unpadded)
    with pytest.raises(BatchError, match="no samples"):
        VisionDataCollator(processor)([])


def test_template_options_reach_the_template():
    collator = VisionDataCollator(PROCESSORS["qwen2_vl"](), template_options={"add_vision_id": True})
    assert "Picture 1: " in PROCESSORS["qwen2_vl"]().tokenizer.decode(collator([one_image()])["input_ids"][0])


def test_collator_goes_to_workers_and_is_deterministic():
    collator, examples = (
        VisionDataCollator(FAMILIES["qwen2_vl"].processor(ZOO["qwen2-vl-digits"])),
        [text_only(), one_image()],
    )
    first, second = collator(examples), pickle.loads(pickle.dumps(collator))(examples)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_packs_are_flattened(processor):
    collator = VisionDataCollator(processor)
    flat, packed = collator([text_only(), one_image()]), collator([[text_only(), one_image()]])
    assert all(torch.equal(flat[key], packed[key]) for key in flat)


@pytest.mark.parametrize("image", [7, {"bytes": b"no image"}, {"path": None}, b"", "http://127.0.0.1:9/x.png"])
def test_what_is_no_image_is_refused_by_name(processor, image):
    with pytest.raises(BatchError, match=r'Sample 0 \("What is this\?"\): the image .* cannot be read'):
        VisionDataCollator(processor)(
            [{"messages": [turn("user", "What is this?"), turn("assistant", "A.")], "image": image}]
        )


def test_encoded_images_are_read(processor):
    stream = io.BytesIO()
    photographs()["chelsea"].save(stream, "PNG")
    collator = VisionDataCollator(processor)
    expected = collator([one_image("chelsea")])
    for image in (stream.getvalue(), {"bytes": stream.getvalue(), "path": None}):
        example = {"messages": [turn("user", image, "What is this?"), turn("assistant", "A cat.")]}
        assert torch.equal(collator([example])["pixel_values"], expected["pixel_values"])
        assert collator.measure(example) == collator.measure(one_image("chelsea"))


def test_parts_of_messages_that_would_be_lost_are_refused(processor):
    messages = [turn("user", "Call it."), {"role": "assistant", "content": "8", "tool_calls": [{"name": "f"}]}]
    with pytest.raises(BatchError, match="the assistant message has 'tool_calls', which would be lost"):
        VisionDataCollator(processor)([{"messages": messages}])

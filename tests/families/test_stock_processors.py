"""Every artifact opens with transformers' own AutoProcessor, which needs torchvision for models that take videos."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import copied
from processors import photographs
from setups import SETUPS
from transformers import AutoProcessor
from transformers.utils.import_utils import is_torchvision_available

from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.families import FAMILIES
from vlmbuild.zoo import ZOO

VIDEO = "video_processor"


def opens(directory):
    """Open it, or without torchvision look for the sections that AutoProcessor would read."""
    if is_torchvision_available():
        processor = AutoProcessor.from_pretrained(directory)
        assert processor.tokenizer.chat_template or processor.chat_template
        return
    found = json.loads((directory / "processor_config.json").read_text())
    family = next(family for family in FAMILIES.values() if found["processor_class"] in family.processors)
    assert found["image_processor"]["image_processor_type"].endswith("ImageProcessor")
    videos = "pixel_values_videos" in family.input_layout or family.name == "smolvlm"  # whose videos are refused
    assert (VIDEO in found) == videos


@pytest.mark.parametrize("name", [*ZOO, "qwen2_5_vl"])
def test_checkpoints_open_and_stay_so_when_saved_again(name, checkpoint_of, tmp_path):
    source = checkpoint_of(name)
    opens(source)
    Checkpoint.open(source).processor.save_pretrained(tmp_path)
    opens(tmp_path)
    saved, own = (json.loads((path / "processor_config.json").read_text()) for path in (tmp_path, source))
    assert (VIDEO in saved) == (VIDEO in own)
    assert {**saved.get(VIDEO, {}), **own.get(VIDEO, {})} == saved.get(VIDEO, {})  # the stock class adds its defaults


def test_a_processor_that_was_saved_without_torchvision_is_completed(tmp_path):
    source = copied(ZOO["qwen2-vl-digits"], tmp_path / "source")
    file = source / "processor_config.json"
    values = json.loads(file.read_text())
    section = values.pop(VIDEO)
    bare, family = json.dumps(values).encode(), FAMILIES["qwen2_vl"]
    (completed,) = family.stock_files({file.name: bare}).values()
    file.write_bytes(completed)
    opens(source)
    assert json.loads(completed)[VIDEO] == section
    assert not family.stock_files({file.name: completed})
    # The stock class finds the settings there too.
    assert not family.stock_files({file.name: bare, "preprocessor_config.json": b"{}"})


PUBLISHED = {"min_pixels": 3136, "max_pixels": 12845056}


@pytest.mark.parametrize(
    ("files", "size"),
    [
        ({}, (100352, 602112)),
        ({"preprocessor_config.json": PUBLISHED}, (3136, 12845056)),  # transformers takes an image's limits for frames
        ({"video_preprocessor_config.json": {"size": {"shortest_edge": 1, "longest_edge": 2}}}, (1, 2)),
        ({"video_preprocessor_config.json": {"max_pixels": 5}, "preprocessor_config.json": PUBLISHED}, (100352, 5)),
        ({"preprocessor_config.json": PUBLISHED, VIDEO: {"size": {"shortest_edge": 3, "longest_edge": 4}}}, (3, 4)),
    ],
)
def test_frames_have_the_size_that_the_stock_class_reads(files, size, tmp_path):
    source = copied(ZOO["qwen2-vl-digits"], tmp_path / "source")
    combined = json.loads((source / "processor_config.json").read_text())
    settings = {name: {**combined["image_processor"], **values} for name, values in files.items()}
    for values in settings.values():
        if "max_pixels" in values:
            values.pop("size")
    combined.pop(VIDEO)
    section = settings.pop(VIDEO, None)
    (source / "processor_config.json").write_text(json.dumps({**combined, **({VIDEO: section} if section else {})}))
    for name, values in settings.items():
        (source / name).write_text(json.dumps(values))
    processor = Checkpoint.open(source).processor
    assert (processor.video_processor.size["shortest_edge"], processor.video_processor.size["longest_edge"]) == size
    processor.save_pretrained(tmp_path / "saved")
    assert FAMILIES["qwen2_vl"].processor(tmp_path / "saved").video_processor.size == processor.video_processor.size


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_stock_processor_writes_what_ours_writes(name, tmp_path):
    if not is_torchvision_available():
        pytest.skip("AutoProcessor itself was not run: torchvision is not installed; sections of files were compared")
    if name == "smolvlm":
        pytest.importorskip("num2words", reason="transformers' SmolVLMProcessor needs num2words")
    setup = SETUPS[name](False)
    ours = setup.processor
    ours.save_pretrained(tmp_path)
    stock = AutoProcessor.from_pretrained(tmp_path)
    assert (type(stock).__name__, type(stock).__module__.split(".")[0]) == (*setup.family.processors, "transformers")
    photos = [photographs()[key].resize((90, 60)) for key in ("coffee", "tall")]
    content = [{"type": "text", "text": "Look:"}, *[{"type": "image"}] * 2, {"type": "text", "text": "What?"}]
    text = [ours.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)] * 2
    batch, expected = (
        one(text=text, images=[photos, photos[::-1]], padding=True, return_tensors="pt") for one in (stock, ours)
    )
    assert text[0] == stock.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert expected.keys() <= batch.keys()
    for key in expected:
        tolerance = 0.2 if key == "pixel_values" else 0.0  # torchvision resizes otherwise than Pillow
        torch.testing.assert_close(batch[key], expected[key], rtol=0.0, atol=tolerance)

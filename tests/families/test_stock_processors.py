"""Every artifact opens with transformers' own AutoProcessor, which needs torchvision for models that take videos."""

from __future__ import annotations

import json

import pytest
from checkpoints import copied
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
    assert found["image_processor"]["image_processor_type"].endswith("ImageProcessor")
    assert (VIDEO in found) == (found["processor_class"] == "Qwen2VLProcessor")


@pytest.mark.parametrize("name", ZOO)
def test_zoo_checkpoints_open_and_stay_so_when_saved_again(name, tmp_path):
    opens(ZOO[name])
    Checkpoint.open(name).processor.save_pretrained(tmp_path)
    opens(tmp_path)
    saved, own = (json.loads((path / "processor_config.json").read_text()) for path in (tmp_path, ZOO[name]))
    assert saved.get(VIDEO) == own.get(VIDEO)


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


def test_what_was_skipped():
    if not is_torchvision_available():
        pytest.skip("AutoProcessor itself was not run: torchvision is not installed; sections of files were compared")

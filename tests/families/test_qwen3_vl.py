"""Qwen3-VL: DeepStack, interpolated positions, frames apart in the text; videos against transformers."""

from __future__ import annotations

import copy

import matrix
import numpy as np
import pytest
import torch
from parity import MODEL_FP32, relative
from processors import photographs
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize
from transformers.utils.import_utils import is_torchvision_available
from transformers.video_utils import VideoMetadata
from videos import pan, text_of

from vlmbuild.errors import BatchError, SourceError
from vlmbuild.families import FAMILIES, family_of
from vlmbuild.families.qwen3_vl.processor import VideoFrameProcessor

FAMILY = FAMILIES["qwen3_vl"]
SIZE = {"shortest_edge": 32 * 32, "longest_edge": 6 * 96 * 64}
WHOLE = {"size": SIZE, "do_sample_frames": False}


@pytest.fixture(scope="module")
def setup():
    return matrix.tiny("qwen3_vl")


@pytest.fixture(scope="module")
def theirs(setup):
    return matrix.reference(setup)


@pytest.fixture(scope="module")
def program(setup):
    return matrix.program(setup)


@pytest.fixture(scope="module")
def ours(setup, program, theirs):
    return matrix.bind(setup, program, theirs)


@pytest.fixture(scope="module")
def mixed(setup):
    """Videos, images and text, with the ids of the processor's vocabulary that the model has."""
    whole = matrix.SETUPS["qwen3_vl"](False)
    texts = [
        text_of(setup, "Compare", "video", "with", "image", "and say which is older."),
        text_of(setup, "image", "Look!"),
        text_of(setup, "Name three planets."),
        text_of(setup, "video"),
    ]
    made = setup.processor(
        text=texts,
        images=[photographs()["chelsea"].resize((90, 60)), photographs()["tall"].resize((30, 200))],
        videos=[pan(6), pan(3, (64, 128))],
        padding=True,
        padding_side="left",
        return_tensors="pt",
        videos_kwargs=WHOLE,
    )
    batch = {key: value for key, value in made.items() if isinstance(value, torch.Tensor)}
    media = torch.tensor([whole.values["image_token_id"], whole.values["video_token_id"]])
    labels = batch["input_ids"].masked_fill(
        (batch["attention_mask"] == 0) | torch.isin(batch["input_ids"], media), -100
    )
    labels[torch.arange(4), batch["attention_mask"].argmax(1)] = -100
    return batch, labels


@pytest.fixture(scope="module")
def wide(setup, mixed):
    """The setup with a vocabulary that has the times of frames, too."""
    batch, _ = mixed
    full = matrix.SETUPS["qwen3_vl"](False)
    tokens = {key: value for key, value in full.values.items() if "token_" in key and value is not None}
    setup = matrix.replace(
        full, vocabulary=torch.cat([batch["input_ids"].flatten(), torch.tensor([*tokens.values()])]).unique()
    )
    ids = {key: int(setup.shrunk(torch.tensor(value))) for key, value in tokens.items()}
    text = {**full.values["text_config"], "vocab_size": len(setup.vocabulary)}
    return matrix.replace(setup, values={**full.values, **ids, "text_config": text})


def test_videos_images_and_text_in_one_batch_equal_transformers(mixed, wide):
    batch, labels = mixed
    assert batch["video_grid_thw"].tolist() == [[3, 4, 4], [2, 8, 4]]
    batch = {**batch, "input_ids": wide.shrunk(batch["input_ids"])}
    labels = torch.where(labels < 0, labels, wide.shrunk(labels.clamp(min=int(wide.vocabulary[0]))))
    theirs = matrix.reference(wide)
    found = matrix.errors(matrix.bind(wide, matrix.program(wide), theirs), theirs, batch, labels)
    for what in ("logits", "loss", "gradient"):
        assert found[what] <= MODEL_FP32, (what, found)


def test_frames_of_a_video_are_apart_and_named_in_refusals(mixed, wide):
    batch, _ = mixed
    batch = {**batch, "input_ids": wide.shrunk(batch["input_ids"])}
    tensors = FAMILY.prepare(batch, wide.config()).tensors
    video = (tensors["input_ids"] == wide.values["video_token_id"])[0]
    runs = torch.diff(video.int(), prepend=torch.zeros(1)).eq(1).sum()
    assert int(runs) == 3 + 2 and int(video.sum()) == 3 * 4 + 2 * 8
    short = batch["input_ids"].clone()
    short[0, (short[0] == wide.values["video_token_id"]).nonzero()[0]] = 0
    with pytest.raises(BatchError, match=r"Sample 0: video 0 \(grid 1 x 4 x 4\) has 4 features"):
        FAMILY.prepare({**batch, "input_ids": short}, wide.config())


def test_blocks_are_shared_and_additions_are_between_them(program):
    image = [call.region for call in program.variants["image"].calls]
    assert image.count("language_model.layers") == image.count("visual.blocks") == 3
    assert image.count("glue") == image.count("visual.deepstack_merger_list") == 2
    text = [call.region for call in program.variants["text"].calls]
    assert text.count("language_model.layers") == 3 and "glue" not in text


@pytest.mark.parametrize(
    "part", ["deepstack_merger_list.0.linear_fc2", "deepstack_merger_list.1.linear_fc2", "pos_embed"]
)
def test_each_part_of_the_tower_matters(part, setup, ours):
    batch, _ = matrix.batch(setup, *matrix.conversations(setup)["one image"])
    weight = dict(ours.named_parameters())[f"model.visual.{part}.weight"]
    kept = weight.detach().clone()
    with torch.no_grad():
        before = ours(**batch).logits
        weight.zero_()
        after = ours(**batch).logits
        weight.copy_(kept)
    assert relative(after, before) > 1e-3


def test_positions_are_mixed_off_the_grid(setup):
    batch, _ = matrix.batch(setup, *matrix.conversations(setup)["several sizes"])
    tensors = FAMILY.prepare(batch, setup.config()).tensors
    weights = tensors["grid_weights"]
    assert (weights.sum(1) - 1).abs().max() < 1e-6
    assert {1, 2, 4} <= set((weights > 0.01).sum(1).tolist())  # corners, edges, the rest
    assert int(tensors["grid_indices"].max()) == 80


def test_frames_are_sampled_and_sized_as_transformers_does(setup):
    images = setup.processor.image_processor
    process = VideoFrameProcessor(images, SIZE)
    frames = pan(40)
    made = process([frames], return_tensors="pt", return_metadata=True)
    chosen = Qwen3VLVideoProcessor.sample_frames(process, VideoMetadata(40, fps=24))
    assert made["video_metadata"][0].frames_indices.tolist() == chosen.tolist() and len(chosen) == 4
    height, width = smart_resize(
        4, 84, 112, factor=32, min_pixels=SIZE["shortest_edge"], max_pixels=SIZE["longest_edge"]
    )
    assert made["video_grid_thw"].tolist() == [[2, height // 16, width // 16]]
    same = process([[frames[n] for n in chosen]], return_tensors="pt", do_sample_frames=False)
    assert torch.equal(same["pixel_values_videos"], made["pixel_values_videos"])
    array = process(np.stack([np.asarray(frame) for frame in frames]), return_tensors="pt", fps=1)
    assert array["video_grid_thw"].tolist()[0][0] == 2


def test_a_saved_processor_has_the_stock_names_and_loads_again(setup, tmp_path):
    setup.processor.save_pretrained(tmp_path)
    written = (tmp_path / "processor_config.json").read_text()
    assert '"Qwen3VLVideoProcessor"' in written and "FrameProcessor" not in written
    loaded = FAMILY.processor(tmp_path)
    assert isinstance(loaded.video_processor, VideoFrameProcessor) != is_torchvision_available()
    options = {"text": [text_of(setup, "video")], "videos": [pan(5)], "return_tensors": "pt"}
    first, second = setup.processor(**options), loaded(**options)
    for key in first.keys() - {"video_metadata"}:  # torchvision resizes otherwise than Pillow
        tolerance = 0.2 if key == "pixel_values_videos" and is_torchvision_available() else 0.0
        torch.testing.assert_close(first[key], second[key], rtol=0.0, atol=tolerance)


def test_times_are_written_before_frames(setup):
    facts = [{"total_num_frames": 4, "fps": 2.0, "frames_indices": [0, 1, 2, 3]}]
    options = {"videos_kwargs": {**WHOLE, "video_metadata": facts}, "return_tensors": "pt"}
    made = setup.processor(text=[text_of(setup, "video")], videos=[pan(4)], **options)
    written = setup.processor.tokenizer.decode(made["input_ids"][0])
    assert "<0.2 seconds><|vision_start|>" in written and "<1.2 seconds><|vision_start|>" in written


def test_experts_are_refused_with_the_reason():
    with pytest.raises(SourceError, match=r"Qwen3VLMoeForConditionalGeneration: layers of experts \(MoE\)"):
        family_of({"architectures": ["Qwen3VLMoeForConditionalGeneration"]}, "config.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("text_config.rope_parameters.mrope_interleaved", False, "mrope_interleaved False"),
        ("text_config.rope_parameters.mrope_section", [8, 10, 6], "take turns in 24"),
        ("text_config.rope_parameters.mrope_section", [8, 8], "24 angles"),
        ("vision_config.out_hidden_size", 64, "out_hidden_size 64"),
        ("vision_config.num_position_embeddings", 80, "must be a square"),
        ("vision_config.deepstack_visual_indexes", [1, 0], "in order"),
        ("vision_config.deepstack_visual_indexes", [3], "of 3 vision blocks"),
    ],
)
def test_configs_that_would_be_captured_wrongly_are_refused(setup, path, value, message):
    values = copy.deepcopy(setup.values)
    *parents, key = path.split(".")
    part = values
    for name in parents:
        part = part[name]
    part[key] = value
    with pytest.raises(SourceError, match=message):
        FAMILY.config(values)

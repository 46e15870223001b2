"""Idefics3 and SmolVLM: positions and order of a tile's patches, tiles that are real, line breaks and tags of images."""

from __future__ import annotations

import copy
import json

import matrix
import numpy as np
import pytest
import torch
from PIL import Image
from setups import PROCESSORS
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from vlmbuild.errors import BatchError, SourceError
from vlmbuild.families import FAMILIES
from vlmbuild.families.idefics3.model import position_ids
from vlmbuild.families.idefics3.processor import tile_grid
from vlmbuild.families.tiles import TileLayout
from vlmbuild.train.collator import VisionDataCollator

FAMILY = FAMILIES["smolvlm"]
NAMES = ("smolvlm", "idefics3")


@pytest.fixture(scope="module")
def setup():
    return matrix.tiny("smolvlm")


@pytest.fixture(scope="module")
def config(setup):
    return setup.config()


@pytest.fixture
def batch(setup):
    """Samples with two images, one, and none: 10, 5 and no tiles."""
    return matrix.batch(setup, *matrix.conversations(setup)["counts differ, left"])[0]


@pytest.mark.parametrize("rows", [1, 6, 19, 25, 26, 27, 29, 32])
def test_positions_equal_those_that_transformers_looks_up(rows, setup):
    vision = copy.copy(setup.config().vision_config)
    vision.image_size, vision.patch_size = 2 * rows, 2
    embeddings, seen = Idefics3VisionEmbeddings(vision), []
    embeddings.position_embedding.register_forward_hook(lambda _module, ids, _result: seen.append(ids[0]))
    embeddings(torch.zeros(1, 3, 2 * rows, 2 * rows), torch.ones(1, rows, rows, dtype=torch.bool))
    assert torch.equal(position_ids(rows), seen[0].flatten())


def test_positions_are_not_numbers_in_order():
    """In float32 fractions of 25 rows fall into other buckets."""
    assert not torch.equal(position_ids(25), torch.arange(625))


def test_patches_of_a_block_are_neighbours():
    tile = TileLayout(channels=1, side=13, patch=2, merge=3)  # a pixel is left over
    number = torch.arange(36).view(6, 6).repeat_interleave(2, 0).repeat_interleave(2, 1)
    pixels = torch.full((2, 1, 13, 13), -1)
    pixels[..., :12, :12] = number
    found = tile.cut(pixels)
    assert found.shape == (2 * 36, 4)
    assert found[:9, 0].tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert torch.equal(found[:36, 0].long(), tile.in_blocks(torch.arange(36)))
    assert torch.equal(found[:36], found[36:])


def test_regions(setup):
    program = matrix.program(setup)
    instances = {name: len(region.instances) for name, region in program.regions.items() if len(region.instances) > 1}
    assert instances == {"vision_model.encoder.layers": 2, "text_model.layers": 3}
    names = [entry.name for entry in program.variants["image"].inputs]
    assert names == ["input_ids", "position_ids", "text_cu_seqlens", "feature_index", "pixel_values"]


def test_tiles_that_pad_a_batch_are_left_out(setup, config, batch):
    tile = FAMILY.tile(config)
    tensors = FAMILY.prepare(batch, config).tensors
    assert batch["pixel_values"].shape[:2] == (3, 10)
    assert len(tensors["pixel_values"]) == 15 * tile.patches
    unmasked = {key: value for key, value in batch.items() if key != "pixel_attention_mask"}
    again = FAMILY.prepare(unmasked, config).tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_a_tile_of_zeros_is_an_image_where_the_mask_says_so(config, batch):
    """transformers takes it for padding; without a mask so does this package."""
    black = batch["pixel_values"].clone()
    black[0, 3] = 0
    zeros = {**batch, "pixel_values": black}
    assert len(FAMILY.prepare(zeros, config).tensors["pixel_values"]) == 15 * FAMILY.tile(config).patches
    del zeros["pixel_attention_mask"]
    with pytest.raises(BatchError, match="Sample 0 has 40 image tokens, but its 9 tiles have 36 features"):
        FAMILY.prepare(zeros, config)


def test_bad_tiles_are_named(config, batch):
    mask, pixels = batch["pixel_attention_mask"], batch["pixel_values"]
    part, hidden = mask.clone(), mask.clone()
    part[1, 2, :, 20:] = 0
    hidden[1, 4] = 0
    for changed, message in (
        ({"pixel_attention_mask": part}, "Sample 1: tile 2 is masked in part"),
        ({"pixel_attention_mask": hidden}, "Sample 1: tile 4 is masked, but holds an image"),
        ({"pixel_attention_mask": mask[:, :1]}, r"pixel_attention_mask must be .* \(3, 10, 40, 40\)"),
        ({"pixel_values": pixels[:, :, :, :39]}, r"\(samples, tiles, 3, 40, 40\), but has shape \(3, 10, 3, 39, 40\)"),
        ({"pixel_values": pixels.tolist()}, "type list"),
        ({"pixel_values": pixels.roll(1, 0), "pixel_attention_mask": mask.roll(1, 0)}, "Sample 0 has 40 .* 0 tiles"),
    ):
        with pytest.raises(BatchError, match=message):
            FAMILY.prepare({**batch, **changed}, config)


def test_images_without_image_tokens_and_only_padding(config, batch):
    text = {key: batch[key][2:] for key in batch}
    assert FAMILY.prepare(text, config).variant == "text"  # its tiles are all padding
    with pytest.raises(BatchError, match="tile 0 has 4 features but no image tokens"):
        FAMILY.prepare(
            {
                **text,
                "pixel_values": batch["pixel_values"][:1],
                "pixel_attention_mask": batch["pixel_attention_mask"][:1],
            },
            config,
        )


SIZES = ((1, 1), (1, 900), (700, 1), (64, 64), (100, 37), (37, 100), (81, 80), (120, 41), (333, 332), (5000, 30))


@pytest.mark.parametrize("edge", [80, 100, 39, 40, 41])
def test_tiles_are_counted_as_the_processor_cuts_them(setup, edge):
    images = copy.copy(setup.processor.image_processor)
    images.size = {"longest_edge": edge}
    for split in (True, False):
        images.do_image_splitting = split
        for width, height in SIZES:
            picture = Image.fromarray(np.full((height, width, 3), 9, np.uint8))
            made = images([picture], return_row_col_info=True, return_tensors="pt")
            found = tile_grid(images, height, width)
            assert found == (made["rows"][0][0], made["cols"][0][0]), (width, height)
            assert made["pixel_values"].shape[1] == found[0] * found[1] + 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", [True, False])
def test_image_tokens_are_those_of_the_text(name, split):
    processor = copy.copy(PROCESSORS[name]())
    processor.image_processor = copy.copy(processor.image_processor)
    processor.image_processor.do_image_splitting = split
    photo = matrix.photographs()["tall"]
    ids = processor(text=["a<image>b"], images=[[photo]], return_tensors="pt")["input_ids"]
    rest = len(processor.tokenizer("ab", add_special_tokens=False)["input_ids"])
    count = FAMILIES[name].image_tokens(processor, photo.height, photo.width)
    assert ids.shape[1] == rest + count or ids.shape[1] == 2 + count
    media = torch.tensor(sorted(FAMILIES[name].media_tokens(processor)))
    assert int(FAMILIES[name].is_media(ids, media, processor.image_token_id).sum()) == count


@pytest.mark.parametrize("name", NAMES)
def test_line_breaks_of_images_are_no_labels_and_those_of_texts_are(name):
    setup = matrix.tiny(name)
    photo = matrix.photographs()["chelsea"]
    content = [{"type": "image"}, {"type": "text", "text": "\n\nWhat?\n"}, {"type": "image"}]
    sample = {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "\n\nA cat.\n"}],
        "images": [photo, photo],
    }
    made = VisionDataCollator(setup.processor, responses_only=False)([sample])
    learned = made["input_ids"][made["labels"] != -100]
    text = setup.processor.tokenizer.decode(learned)
    assert text.count("\n\n") == 2 and text.count("A cat.\n") == 1
    assert "<" not in text.replace("<end_of_utterance>", "").replace("<|im_start|>", "").replace(
        "<|begin_of_text|>", ""
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_factor": 5}, "scale_factor 5 must divide the 6 rows"),
        ({"vision_config": {"patch_size": 41}}, "image_size 40 must be 1 to 1024 patches"),
        ({"vision_config": {"image_size": [40, 40]}}, "image_size"),
        ({"vision_config": {"attention_dropout": 0.1}}, "attention_dropout 0.1"),
        ({"text_config": {"model_type": "mistral"}}, "model_type 'mistral' must be llama"),
    ],
)
def test_configs_of_another_kind_are_refused(setup, changes, message):
    values = copy.deepcopy(setup.values)
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    with pytest.raises(SourceError, match=message):
        FAMILY.config(values)


def test_a_processor_saved_without_torchvision_has_the_section_for_videos(tmp_path):
    PROCESSORS["smolvlm"]().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "processor_config.json").read_text())
    section = values.pop("video_processor")
    assert values["processor_class"] == "SmolVLMProcessor"
    assert section["video_processor_type"] == "SmolVLMVideoProcessor"
    assert section["max_image_size"] == {"longest_edge": 512} and section["video_sampling"]["max_frames"] == 64
    bare = json.dumps(values).encode()
    (completed,) = FAMILY.stock_files({"processor_config.json": bare}).values()
    assert json.loads(completed)["video_processor"] == section
    assert not FAMILY.stock_files({"processor_config.json": completed})
    assert not FAMILY.stock_files({"processor_config.json": bare, "preprocessor_config.json": b"{}"})

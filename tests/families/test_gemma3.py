"""Gemma 3: blocks of image tokens, sliding windows, pan and scan, line breaks around images, refusals."""

from __future__ import annotations

import copy
import json

import matrix
import pytest
import torch
from parity import MODEL_FP32, assert_close
from processors import CONFIGS
from setups import PROCESSORS
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from vlmbuild.errors import BatchError, SourceError
from vlmbuild.families import FAMILIES
from vlmbuild.families.gemma3.prepare import lookahead
from vlmbuild.train.collator import VisionDataCollator

FAMILY = FAMILIES["gemma3"]


@pytest.fixture(scope="module")
def setup():
    return matrix.tiny("gemma3")


@pytest.fixture(scope="module")
def config(setup):
    return setup.config()


@pytest.fixture(scope="module")
def theirs(setup):
    return matrix.reference(setup).eval()


@pytest.fixture(scope="module")
def ours(setup, theirs):
    return matrix.bind(setup, matrix.program(setup), theirs).eval()


@pytest.fixture
def batch(setup):
    """Samples with two images, one, and none, padded on the left."""
    return matrix.batch(setup, *matrix.conversations(setup)["counts differ, left"])[0]


def test_lookahead_reaches_the_end_of_the_block_that_transformers_sees():
    generator = torch.Generator().manual_seed(0)
    types = torch.rand(40, 12, generator=generator) < 0.6
    index = torch.arange(types.numel())
    blocks = get_block_sequence_ids_for_mask(types.long())
    found = lookahead(types.flatten(), index, 12).view(40, 12)
    for row in range(40):
        for column in range(12):
            after = [int(other) for other in blocks[row, column:]]
            expected = sum(other == after[0] for other in after) - 1 if types[row, column] else 0
            assert int(found[row, column]) == expected


def test_blocks_are_longer_than_the_window_and_text_has_none(setup, config, batch):
    ahead = FAMILY.prepare(batch, config).tensors["lookahead"]
    assert int(ahead.max()) == config.mm_tokens_per_image - 1 > config.text_config.sliding_window
    assert int((ahead > 0).sum()) == 3 * (config.mm_tokens_per_image - 1)
    text, _ = matrix.batch(setup, *matrix.conversations(setup)["text only"])
    assert not FAMILY.prepare(text, config).tensors["lookahead"].any()


def test_layers_of_both_variants_are_the_same(setup):
    program = matrix.program(setup)
    instances = {name: len(region.instances) for name, region in program.regions.items() if ".layers" in name}
    assert sorted(instances.values()) == [1, 2, 2]  # full, sliding, and the tower's


@pytest.mark.parametrize("case", ["one image", "counts differ, left", "text only"])
def test_greedy_tokens_equal_transformers_past_the_window(case, setup, config, ours, theirs):
    inputs, _ = matrix.batch(setup, *matrix.conversations(setup)[case])
    options = {"max_new_tokens": 2 * config.text_config.sliding_window, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options, pad_token_id=0))


def test_crops_of_pan_and_scan_are_images(setup, config, ours, theirs):
    processor = setup.processor
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image"}]}],
        add_generation_prompt=True,
    )
    made = processor(
        text=[text],
        images=[[matrix.photographs()["wide"].resize((900, 300))]],
        do_pan_and_scan=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
    assert len(made["pixel_values"]) == 4
    assert FAMILY.prepare(made, with_published_ids(config)).tensors["lookahead"].gt(0).sum() == 4 * 15


def with_published_ids(config):
    """Copy a config with the processor's own ids."""
    whole = copy.deepcopy(config)
    whole.image_token_id, whole.text_config.vocab_size = 262144, 262208
    return whole


def test_types_that_differ_from_the_image_tokens_are_refused(config, batch):
    types = batch["token_type_ids"].clone()
    types[1, -1] = 1
    for changed, message in (
        ({"token_type_ids": types}, "Sample 1: 1 tokens are image tokens"),
        ({"token_type_ids": types[:, 1:]}, "token_type_ids have shape"),
        ({"token_type_ids": None}, "token_type_ids are missing"),
        ({"pixel_values": batch["pixel_values"][..., :40]}, r"\(tiles, 3, 48, 48\), but has shape \(3, 3, 48, 40\)"),
        (
            {"pixel_values": batch["pixel_values"][:2]},
            "Sample 1 has 16 image tokens for which the batch holds no image",
        ),
    ):
        with pytest.raises(BatchError, match=message):
            FAMILY.prepare({**batch, **changed}, config)


def test_line_breaks_of_texts_that_become_one_with_those_of_images():
    photo = matrix.photographs()["chelsea"]
    content = [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "image"}]
    sample = {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}],
        "images": [photo, photo],
    }
    collator = VisionDataCollator(PROCESSORS["gemma3"]())
    made = collator([sample])
    tokenizer = PROCESSORS["gemma3"]().tokenizer
    assert tokenizer.decode(made["input_ids"][0]).startswith("<bos><start_of_turn>user\n\n\n<start_of_image>")
    assert tokenizer.decode(made["labels"][0][made["labels"][0] != -100]).strip() == "A cat.<end_of_turn>"
    assert collator.measure(sample).tokens == made["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("", {"mm_tokens_per_image": 15}, "mm_tokens_per_image 15 must be the square"),
        ("", {"mm_tokens_per_image": 9}, "mm_tokens_per_image 9 must be the square"),
        ("text_config", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ("text_config", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ("text_config", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("text_config", {"sliding_window": None}, "sliding_window None"),
        ("text_config", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("text_config", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar 0"),
        ("vision_config", {"vision_use_head": True}, "vision_use_head True"),
        ("vision_config", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ],
)
def test_configs_that_would_be_captured_wrongly_are_refused(setup, part, changes, message):
    values = copy.deepcopy(setup.values)
    (values[part] if part else values).update(changes)
    with pytest.raises(SourceError, match=message):
        FAMILY.config(values)


def test_every_kind_of_layer_has_frequencies_that_do_not_change(setup):
    values = copy.deepcopy(setup.values)
    values["text_config"]["rope_parameters"]["full_attention"] = {
        "rope_type": "dynamic",
        "factor": 2.0,
        "rope_theta": 1e6,
    }
    with pytest.raises(SourceError, match="rope_type 'dynamic'"):
        FAMILY.config(values)


def test_one_image_alone_equals_transformers(setup, ours, theirs):
    inputs, _ = matrix.batch(setup, [[matrix.photographs()["rocket"]]], "right")
    with torch.no_grad():
        assert_close(ours(**inputs).logits, theirs(**inputs).logits, MODEL_FP32)


def test_files_for_clients_have_what_published_ones_leave_out():
    folder = CONFIGS / "gemma-3-4b"
    values, images, processor = (
        json.loads((folder / f"{name}config.json").read_text()) for name in ("", "preprocessor_", "processor_")
    )
    files = {"preprocessor_config.json": images, "processor_config.json": processor, "tokenizer_config.json": {}}
    written = FAMILY.client_files(values, files, "template")
    text = written["config.json"]["text_config"]
    assert [text[name] for name in ("num_hidden_layers", "num_key_value_heads", "head_dim")] == [34, 4, 256]
    assert written["processor_config.json"]["image_seq_length"] == 256
    assert written["preprocessor_config.json"]["resample"] == 2
    tokens = [written["tokenizer_config.json"][name] for name in ("boi_token", "image_token", "eoi_token")]
    assert tokens == ["<start_of_image>", "<image_soft_token>", "<end_of_image>"]

"""Tests of every family in `matrix.SETUPS`: names, costs, processors, refused configs and batches."""

from __future__ import annotations

import copy

import matrix
import pytest
import torch
from safetensors import safe_open

from vlmbuild.errors import BatchError, IncompatibleError, SourceError, UsageError
from vlmbuild.families import FAMILIES, family_named, family_of, family_of_processor


@pytest.fixture(scope="module", params=matrix.SETUPS)
def setup(request):
    return matrix.shrink(matrix.SETUPS[request.param](False))


@pytest.fixture(scope="module")
def config(setup):
    return setup.config()


@pytest.fixture
def batch(setup):
    """Samples with two images, one, and none, padded on the left; a copy that a test may spoil."""
    return matrix.batch(setup, *matrix.conversations(setup)["counts differ, left"])[0]


def test_every_family_has_a_setup():
    assert set(matrix.SETUPS) == set(FAMILIES)


def test_a_family_is_found_by_name_architecture_and_processor(setup):
    family = setup.family
    assert family_named(family.name) is family
    assert family_of(setup.values, "config.json") is family
    assert family_of_processor(setup.processor) is family


def test_stored_names_equal_those_that_transformers_writes(setup, tmp_path):
    reference, family = matrix.reference(setup), setup.family
    reference.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = set(file.keys())
    names = {name for name, _ in reference.named_parameters()}
    assert names == {name for name, slot in matrix.program(setup).slots() if slot.kind == "parameter"}
    assert {family.stored_name(name) for name in names} == written
    assert {family.module_name(name) for name in written} == names
    assert {family.module_name(name) for name in names} == names  # files with current names are read too


def test_constants_equal_the_buffers_of_transformers(setup, config):
    buffers = dict(matrix.reference(setup).named_buffers())
    constants = setup.family.constants(config)
    assert constants
    for name, tensor in constants.items():
        assert torch.equal(tensor, buffers[name])


def test_costs_and_sizes_equal_what_the_prologue_makes(setup, config):
    photo = matrix.photographs()["chelsea"]
    family, processor = setup.family, setup.processor
    said = ["Look", photo, "and", photo]
    inputs, _ = matrix.batch(setup, [said, said], "right")
    prepared = family.prepare(inputs, config, processor)
    cost = family.image_cost(processor.image_processor, config, photo.height, photo.width)
    assert family.image_tokens(processor, photo.height, photo.width) == cost.tokens
    media = int(torch.isin(inputs["input_ids"], setup.ids(setup.media)).sum())
    assert media == 4 * cost.tokens
    tokens = inputs["input_ids"].shape[1]
    sizes = family.batch_sizes(config, [cost, cost], 2, tokens - 2 * cost.tokens)
    for entry in family.variants(config)["image"]:
        assert prepared.tensors[entry.name].dtype == entry.dtype
        for number, size in zip(prepared.tensors[entry.name].shape, entry.shape, strict=True):
            factor, _, name = str(size).rpartition("*")
            expected = int(name) if name.isdigit() else int(factor or 1) * sizes[name]
            assert number == expected, (entry.name, size)


def test_media_tokens_are_those_that_the_processor_writes_for_an_image(setup):
    known = setup.family.media_tokens(setup.processor)
    assert setup.processor.image_token_id in known
    assert set(setup.processor.tokenizer.convert_tokens_to_ids(list(setup.media))) <= known


def test_a_directory_without_a_tokenizer_is_refused(setup, tmp_path):
    setup.processor.image_processor.save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=r"it has no tokenizer.*tokenizer\.json"):
        setup.family.processor(tmp_path)


def test_code_that_a_config_names_is_ignored(setup):
    code = {"auto_map": {"AutoModel": "evil--code.Model"}, "_attn_implementation": "evil/kernel"}
    config = setup.family.config({**setup.values, **code})
    assert not hasattr(config, "auto_map")
    assert config._attn_implementation != "evil/kernel"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' depends on the data"),
        ({"dropout": 0.1, "attention_dropout": 0.1}, "attention dropout 0.1"),
        ({"hidden_size": "wide"}, "not a valid"),
    ],
)
def test_configs_that_would_be_captured_wrongly_are_refused(setup, changes, message):
    values = copy.deepcopy(setup.values)
    text = values["text_config"]
    text |= {key: {**text[key], **new} if isinstance(new, dict) else new for key, new in changes.items()}
    with pytest.raises(SourceError, match=message):
        setup.family.config(values)


def test_bad_batches_are_named(setup, batch, config):
    ids, mask, image = batch["input_ids"], batch["attention_mask"], config.image_token_id
    labels = ids.masked_fill(mask == 0, -100)
    removed = ids.clone()
    removed[0, (ids[0] == image).nonzero()[0]] = 5
    added = ids.clone()
    added[2, -1] = image
    cut = {key: value[:, :-1] if value.shape[:2] == ids.shape else value for key, value in batch.items()}
    cut["input_ids"] = torch.cat([cut["input_ids"][:, :-5], torch.full((3, 5), image)], dim=1)
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    for wrong, message in (
        (
            text,
            f"Sample 0 has {int((ids[0] == image).sum())} image tokens .* no image|Sample 0 has 2 image tokens and 0",
        ),
        ({**batch, "labels": labels}, rf"Sample 0: \d+ labels are the image token \({image}\)"),
        ({**batch, "input_ids": removed}, "Sample 0"),
        ({**batch, "input_ids": added}, "Sample 2 has 1 image tokens"),
        (cut, "Sample 0"),
        ({**batch, "input_ids": ids.float()}, "input_ids are torch.float32"),
        ({**batch, "input_ids": ids + 10**6}, r"Sample 0 has token ids from .* embeddings for 0 to"),
        ({**batch, "attention_mask": mask.tolist()}, "attention_mask must be a tensor, not list"),
        ({**batch, "attention_mask": mask[:, 1:]}, "attention_mask has shape"),
        ({**batch, "attention_mask": mask * 0}, "attends to no token"),
        ({**batch, "position_ids": mask}, "position_ids is not supported"),
        ({**batch, "inputs_embeds": mask}, "inputs_embeds is not supported"),
        ({**batch, "past_key_values": mask}, "past_key_values is not supported"),
        ({"attention_mask": mask}, "no input_ids"),
        ({**batch, "pixel_values": batch["pixel_values"][..., :-1]}, "pixel_values|image 0"),
    ):
        with pytest.raises(BatchError, match=message):
            setup.family.prepare(wrong, config)


def test_unknown_names_list_the_supported():
    with pytest.raises(SourceError, match="unknown architecture LlamaForCausalLM.*Qwen2VL"):
        family_of({"architectures": ["LlamaForCausalLM"]}, "config.json")
    with pytest.raises(SourceError, match="without architectures"):
        family_of({"model_type": "llama"}, "config.json")
    for wrong in ("Qwen2VLForConditionalGeneration", 5, [5]):
        with pytest.raises(SourceError, match="architectures must be a list of names"):
            family_of({"architectures": wrong}, "config.json")
    with pytest.raises(IncompatibleError, match="knows mllama, pixtral, qwen2_vl"):
        family_named("other")
    with pytest.raises(UsageError, match="str .*PixtralProcessor"):
        family_of_processor("a tokenizer")

"""Tests of every family in `matrix.SETUPS`: names, costs, processors, refused configs and batches."""

from __future__ import annotations

import copy
import json
import shutil

import matrix
import pytest
import torch
from safetensors import safe_open
from setups.base import with_few_tokens

from vlmbuild.adapters.lora import Lora
from vlmbuild.adapters.select import Targets, adaptable_layers, choose
from vlmbuild.errors import BatchError, IncompatibleError, SourceError, UsageError
from vlmbuild.families import FAMILIES, family_named, family_of, family_of_processor


@pytest.fixture(scope="module", params=matrix.SETUPS)
def setup(request):
    return matrix.tiny(request.param)


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
    current = {"gemma3": ("vision_model.", "")}.get(
        family.name, ("", "")
    )  # published files name a module that is no more
    assert {family.stored_name(name).replace(*current) for name in names} == written
    assert {family.module_name(family.stored_name(name)) for name in names} == names
    assert {family.module_name(name) for name in written} == names
    assert {family.module_name(name) for name in names} == names  # files with current names are read too


def test_constants_equal_the_buffers_of_transformers(setup, config):
    buffers = dict(matrix.reference(setup).named_buffers())
    constants = setup.family.constants(config)
    known = (
        constants.keys() & buffers.keys()
    )  # positions that transformers recomputes are compared by the family's tests
    assert known
    for name in known:
        assert torch.equal(constants[name], buffers[name])


def test_costs_and_sizes_equal_what_the_prologue_makes(setup, config):
    photo = matrix.photographs()["chelsea"]
    family, processor = setup.family, setup.processor
    said = ["Look", photo, "and", photo]
    inputs, _ = matrix.batch(setup, [said, said], "right")
    prepared = family.prepare(inputs, config, processor)
    cost = family.image_cost(processor.image_processor, config, photo.height, photo.width)
    assert family.image_tokens(processor, photo.height, photo.width) == cost.tokens
    media = family.is_media(inputs["input_ids"], setup.ids(setup.media), config.image_token_id)
    assert int(media.sum()) == 4 * cost.tokens
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
        ({"hidden_size": "wide"}, "text_config.hidden_size 'wide'"),
    ],
)
def test_configs_that_would_be_captured_wrongly_are_refused(setup, changes, message):
    values = copy.deepcopy(setup.values)
    text = values["text_config"]
    text |= {key: {**text[key], **new} if isinstance(new, dict) else new for key, new in changes.items()}
    with pytest.raises(SourceError, match=message):
        setup.family.config(values)


def leaf(values, path):
    """The mapping that holds the last key of a path."""
    *parents, key = path.split(".")
    for name in parents:
        values = values[name]
    return values, key


SHARED = ("text_config.hidden_size", "text_config.num_hidden_layers", "text_config.num_attention_heads")


def test_numbers_of_a_config_have_ranges(setup):
    for path in (*SHARED, "text_config.vocab_size", "text_config.num_key_value_heads", *setup.numbers):
        for value in (0, -1, 10**9, 2.5, True, "4", float("nan"), [3], {}):
            values = copy.deepcopy(setup.values)
            part, key = leaf(values, path)
            part[key] = value
            with pytest.raises(SourceError, match=key):
                setup.family.config(values)


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("text_config.rope_parameters.rope_theta", float("nan"), "rope_theta"),
        ("text_config.rope_parameters.rope_theta", float("inf"), "rope_theta"),
        ("text_config.rope_parameters.rope_theta", 0, "rope_theta"),
        ("text_config.rms_norm_eps", -1e-6, "rms_norm_eps"),
        ("text_config.hidden_act", "evil", "hidden_act"),
        ("vision_config.hidden_act", 3, "hidden_act"),
        ("text_config.num_attention_heads", 5, "5|multiple"),
        ("text_config.num_key_value_heads", 3, "num_key_value_heads 3"),
        ("text_config.pad_token_id", 10**7, "pad_token_id"),
        ("text_config.initializer_range", float("nan"), "initializer_range"),
        ("text_config", 5, "config"),
        ("vision_config", [1], "config"),
        ("text_config.layer_types", ["full_attention"] * 10**4, "layer_types"),
        ("num_labels", 10**9, "num_labels"),
    ],
)
def test_contradictions_of_a_config_are_named(setup, path, value, field):
    values = copy.deepcopy(setup.values)
    part, key = leaf(values, path)
    part[key] = value
    with pytest.raises(SourceError, match=field):
        setup.family.config(values)


def test_tokens_of_placeholders_have_embeddings(setup):
    key = next(key for key in ("image_token_id", "image_token_index") if key in setup.values)
    for value in (-1, 10**7):
        with pytest.raises(SourceError, match=f"{key} {value}"):
            setup.family.config({**setup.values, key: value})


def test_settings_of_a_processor_are_in_range(setup, tmp_path, monkeypatch):
    with_few_tokens(setup.processor).save_pretrained(tmp_path / "whole")
    for number, (key, value) in enumerate(
        [
            ("image_std", [0.0] * 3),
            ("image_mean", [float("nan")] * 3),
            ("rescale_factor", 0),
            ("patch_size", 0),
            ("size", None),
        ]
    ):
        directory = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        file = directory / "processor_config.json"
        values = json.loads(file.read_text())
        images = values["image_processor"]
        if key == "size":
            value = {name: 10**9 if side else side for name, side in images["size"].items()}
        elif key == "patch_size" and isinstance(images.get("patch_size"), dict):
            value = {"height": 0, "width": 0}
        elif key == "patch_size" and "patch_size" not in images:
            key, value = "max_image_tiles", 0
        images[key] = value
        file.write_text(json.dumps(values))
        with pytest.raises(SourceError, match=f"{key}|pixels of an image"):
            setup.family.processor(directory)
    monkeypatch.setenv("VLMBUILD_MAX_PIXELS", "100")
    with pytest.raises(SourceError, match="VLMBUILD_MAX_PIXELS"):
        setup.family.processor(tmp_path / "whole")


def test_bad_batches_are_named(setup, batch, config):
    ids, mask, image = batch["input_ids"], batch["attention_mask"], config.image_token_id
    labels = ids.masked_fill(mask == 0, -100)
    short = int(mask.sum(1).argmin())  # most padding
    padded = torch.where((mask == 0) & (torch.arange(3)[:, None] == short), 5, -100)
    none = torch.full_like(ids, -100)
    none[0, -1] = -1
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
        (
            {**batch, "labels": padded},
            rf"Sample {short}: \d+ labels are on padding.*labels\[attention_mask == 0\] = -100",
        ),
        ({**batch, "labels": none}, "Sample 0: 1 labels are no token ids from 0 to"),
        ({**batch, "labels": torch.where(none == -1, 10**6, -100)}, "Sample 0: 1 labels are no token ids"),
        ({**batch, "labels": ids.float()}, "labels are torch.float32"),
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


def test_labels_directly_behind_padding_are_left_out_with_a_warning(setup, batch, config):
    mask = batch["attention_mask"]
    short = int(mask.sum(1).argmin())
    labels = torch.full_like(mask, -100)
    labels[short, mask[short].argmax()] = 5
    with pytest.warns(UserWarning, match=r"behind padding.*attention_mask\[:, :-1\] == 0\] = -100"):
        setup.family.prepare({**batch, "labels": labels}, config)


def test_attention_and_mlp_are_told_from_the_graph(setup):
    program = matrix.program(setup)
    found = {part: set() for part in ("attention", "mlp", "other")}
    tower = {layer.module.rpartition(".")[2] for layer in adaptable_layers(program) if layer.role == "vision"}
    for layer in adaptable_layers(program):
        if layer.role in ("language", "vision") and layer.number is not None:
            found[layer.part].add(layer.module.rpartition(".")[2])
    assert found == {**setup.layers, "other": set()}
    # Names that the vision tower has too are in the language model unless it is asked for.
    chosen = [list(choose(program, Targets(["q_proj"], vision=vision), Lora(4, 8.0))) for vision in (False, True)]
    assert not any("vision" in module for module in chosen[0])
    assert any("vision" in module for module in chosen[1]) == ("q_proj" in tower)
    if not program.ties:
        assert list(choose(program, Targets("head"), Lora(4, 8.0))) == ["lm_head"]


def test_unknown_names_list_the_supported():
    with pytest.raises(SourceError, match="unknown architecture LlamaForCausalLM.*Qwen2VL"):
        family_of({"architectures": ["LlamaForCausalLM"]}, "config.json")
    with pytest.raises(SourceError, match="without architectures"):
        family_of({"model_type": "llama"}, "config.json")
    with pytest.raises(SourceError, match="model_type is 'llava'.*of 'qwen2_vl'"):
        family_of({"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "llava"}, "config.json")
    for wrong in ("Qwen2VLForConditionalGeneration", 5, [5]):
        with pytest.raises(SourceError, match="architectures must be a list of names"):
            family_of({"architectures": wrong}, "config.json")
    with pytest.raises(IncompatibleError, match="knows " + ", ".join(FAMILIES)):
        family_named("other")
    with pytest.raises(UsageError, match="str .*PixtralProcessor"):
        family_of_processor("a tokenizer")

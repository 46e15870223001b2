"""Contradictions within a source, its processor, and files that change while it is read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import copied, edit_config, edit_weights
from parity import MODEL_FP32, assert_close
from safetensors.torch import load_file
from tiny import ATTENDED, BATCH
from transformers import AutoModelForImageTextToText

import vlmbuild
from vlmbuild.builder import build as builder
from vlmbuild.builder.build import build
from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.errors import IncompatibleError, OutputError, SourceError, UsageError
from vlmbuild.recipe import QuantSpec, Recipe
from vlmbuild.zoo import ZOO

FLOAT32 = Recipe(dtype="float32")
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits[ATTENDED]


# Ties ---------------------------------------------------------------------------------------------------------------


def own_head(tensors):
    tensors[HEAD] = tensors[EMBEDDINGS].roll(1, 0).contiguous()


def test_a_head_of_its_own_is_kept_whatever_the_config_says(checkpoint, tmp_path):
    source = copied(checkpoint, tmp_path / "source")
    edit_weights(source, own_head)
    built = build(source, tmp_path / "out", FLOAT32)
    theirs = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    assert_close(logits(vlmbuild.load(built.path)[0]), logits(theirs), MODEL_FP32)
    assert HEAD in load_file(built.path / "model.safetensors")
    config = json.loads((built.path / "config.json").read_text())
    assert not config["tie_word_embeddings"] and not config["text_config"].get("tie_word_embeddings")
    assert not vlmbuild.plan(source).ties


@pytest.mark.parametrize("name", ["pixtral-digits", "mllama-digits"])
def test_families_with_a_head_of_their_own_are_not_tied(name, tmp_path):
    source = copied(ZOO[name], tmp_path / "source")
    for change in ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}):
        edit_config(source, lambda values, change=change: values["text_config"].update(change))
        edit_config(source, lambda values: values.update(tie_word_embeddings=True))
        checkpoint = Checkpoint.open(source)
        assert not checkpoint.family.ties(checkpoint.config)
        assert HEAD in checkpoint.tensors


def test_a_quantized_head_is_not_the_embeddings(checkpoint, tmp_path):
    source = copied(checkpoint, tmp_path / "source")
    edit_weights(source, own_head)
    edit_config(source, lambda values: values.update(tie_word_embeddings=False))
    edit_config(source, lambda values: values["text_config"].update(tie_word_embeddings=False))
    recipe = Recipe(quantize=QuantSpec(roles=("head",)), dtype="float32")
    artifact = build(source, tmp_path / "nf4", recipe).path
    again = copied(artifact, tmp_path / "again")
    edit_config(again, lambda values: values.update(tie_word_embeddings=True))
    opened = Checkpoint.open(again)
    assert not opened.family.ties(opened.config)
    assert opened.tensors[HEAD].format is not None


def test_equal_values_are_tied_under_either_name(checkpoint, plain, tmp_path):
    for number, change in enumerate((lambda t: t.update({HEAD: t[EMBEDDINGS].clone()}), rename_embeddings)):
        source = copied(checkpoint, tmp_path / f"source{number}")
        edit_weights(source, change)
        built = build(source, tmp_path / f"out{number}", FLOAT32)
        assert built.manifest.entry("model.safetensors") == plain.manifest.entry("model.safetensors")


def rename_embeddings(tensors):
    tensors[HEAD] = tensors.pop(EMBEDDINGS)


# Values that the dtype does not hold --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "recipe", "message"),
    [
        (
            "model.layers.1.mlp.down_proj.weight",
            1e5,
            Recipe(dtype="float16"),
            r"±100000, beyond ±65504.*--dtype .*bfloat16",
        ),
        ("model.norm.weight", float("nan"), Recipe(), "holds NaN or infinity"),
        ("visual.blocks.0.norm1.bias", float("inf"), Recipe(dtype="float16"), "holds NaN or infinity"),
        (EMBEDDINGS, 3.4e38, Recipe(), r"3.4e\+38, beyond ±3.38953e\+38, the range of bfloat16.*--dtype float32"),
        pytest.param(
            "model.norm.weight",
            1e5,
            Recipe(dtype="float16", target="onnx"),
            r"beyond ±65504.*--dtype float32\.",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_values_that_the_dtype_does_not_hold_are_named(name, value, recipe, message, checkpoint, tmp_path):
    source = copied(checkpoint, tmp_path / "source")
    edit_weights(source, lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    with pytest.raises(SourceError, match=f"{name} .*{message}"):
        build(source, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_values_that_the_dtype_of_loading_does_not_hold_are_named(plain, tmp_path):
    artifact = copied(plain.path, tmp_path / "artifact")
    edit_weights(artifact, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"][0, :1].fill_(1e5))
    with pytest.raises(IncompatibleError, match=r"layers.1.mlp.down_proj.weight .*±100000, .* float16.*bfloat16"):
        vlmbuild.load(artifact, dtype="float16", verify=False)
    assert vlmbuild.load(artifact, dtype="bfloat16", verify=False)[0].dtype == torch.bfloat16


def test_scales_of_a_quantized_source_are_finite(checkpoint, tmp_path):
    spec = QuantSpec(double_quant=False)
    source = copied(build(checkpoint, tmp_path / "nf4", Recipe(quantize=spec)).path, tmp_path / "source")
    scales = "model.layers.0.mlp.up_proj.weight.absmax"
    edit_weights(source, lambda tensors: tensors[scales][:1].fill_(float("nan")))
    with pytest.raises(SourceError, match=f"{scales} holds NaN"):
        build(source, tmp_path / "out")


# The processor ------------------------------------------------------------------------------------------------------


def without_processor(checkpoint, directory):
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, directory)
    return directory


@pytest.mark.parametrize("target", ["trainable", "onnx", "aoti"])
def test_a_checkpoint_without_a_processor_is_refused_before_any_work(target, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "trace_program", lambda *_: pytest.fail("traced"))
    source = without_processor(checkpoint, tmp_path / "source")
    with pytest.raises(SourceError, match=r"no tokenizer.*--processor"):
        build(source, tmp_path / "out", Recipe(target=target))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, source)
    with pytest.raises(SourceError, match=r"cannot be loaded.*--processor"):  # no image processor
        build(source, tmp_path / "out", Recipe(target=target))


def test_the_processor_may_come_from_elsewhere(run, checkpoint, tmp_path):
    source, other = without_processor(checkpoint, tmp_path / "source"), copied(checkpoint, tmp_path / "other")
    file = other / "processor_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "video_processor": None}).replace(', "video_processor": null', "")
    )
    code, *_ = run("build", source, "-o", tmp_path / "out", "--processor", other, "--dtype", "float32")
    assert code == 0
    assert "video_processor" in json.loads((tmp_path / "out" / file.name).read_text())
    _, processor = vlmbuild.load(tmp_path / "out")
    assert processor.chat_template == Checkpoint.open("qwen2-vl-digits").processor.chat_template
    records = vlmbuild.verify(tmp_path / "out").source
    assert [record["uri"] for record in records] == ["directory", "directory"]
    assert [file["path"] for file in records[0]["files"]] == ["config.json", "model.safetensors"]
    assert {file["path"] for file in records[1]["files"]} >= {"tokenizer.json", "processor_config.json"}


def test_a_processor_of_another_model_is_refused(checkpoint, tmp_path):
    with pytest.raises(SourceError, match="is of Llama 3.2 Vision, and the model is of Qwen2-VL.*--processor"):
        build(checkpoint, tmp_path / "out", processor="mllama-digits")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ broken", "unexpected end of template"),
        ("{{ 'x' * 10**10 }}", "8,388,608 characters"),
        ("{{ messages.nothing.at.all }}", "nothing"),
    ],
)
def test_a_chat_template_that_writes_no_prompt_is_refused(checkpoint, tmp_path, template, message):
    source = copied(checkpoint, tmp_path / "source")
    (source / "chat_template.jinja").write_text(template)
    with pytest.raises(SourceError, match=rf"source: no prompt.* The chat template.*{message}"):
        build(source, tmp_path / "out", Recipe(dtype="float32"))


def test_a_chat_template_may_ask_for_an_image(checkpoint, tmp_path):
    source = copied(checkpoint, tmp_path / "source")
    file = source / "chat_template.jinja"
    asks = "{% if messages[0].content | length < 2 %}{{ raise_exception('an image first') }}{% endif %}"
    file.write_text(asks + file.read_text())
    assert Checkpoint.open(source).processor.chat_template == file.read_text()


# Files that change --------------------------------------------------------------------------------------------------


def rewrite(file):
    file.write_bytes(file.read_bytes() + b"\n")


@pytest.mark.parametrize(
    ("stage", "name", "change"),
    [
        ("open", "tokenizer.json", rewrite),
        ("open", "config.json", Path.unlink),
        ("capture", "model.safetensors", rewrite),
        ("capture", "tokenizer.json", Path.unlink),
        ("weights", "tokenizer.json", Path.unlink),
    ],
)
def test_a_file_that_changes_is_named(stage, name, change, checkpoint, tmp_path, monkeypatch):
    source = copied(checkpoint, tmp_path / "source")
    opened = builder.Checkpoint.processor.func

    def processor(checkpoint):
        found = opened(checkpoint)
        if stage == "open":
            change(source / name)
        return found

    changed = []

    def progress(now, *_):
        if now.startswith(stage) and not changed:
            changed.append(change(source / name))

    monkeypatch.setattr(builder.Checkpoint, "processor", property(processor))
    try:
        built = build(source, tmp_path / "out", FLOAT32, progress=progress)
    except SourceError as error:
        assert name in str(error)
        assert not (tmp_path / "out").exists()
    else:  # it was copied before it changed
        digests = {file["path"]: file["digest"] for file in built.manifest.source[0]["files"]}
        copy = built.manifest.entry("tokenizer.json")
        assert stage != "open"
        assert digests["tokenizer.json"] == copy.digest


def test_an_output_within_the_source_is_refused(checkpoint, tmp_path):
    source = copied(checkpoint, tmp_path / "source")
    for output in (source / "out", source / "a" / ".." / "out"):
        (source / "a").mkdir(exist_ok=True)
        with pytest.raises(OutputError, match="lies in the source"):
            build(source, output)
    linked = tmp_path / "link"
    linked.symlink_to(source)
    with pytest.raises(OutputError, match="lies in the source"):
        build(source, linked / "out")
    with pytest.raises(OutputError, match="lies in the source"):
        build(without_processor(checkpoint, tmp_path / "bare"), source / "out", processor=source)


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "", "y/" * 3000])
def test_paths_that_cannot_be_looked_up_are_errors_of_their_kind(path, checkpoint, tmp_path):
    with pytest.raises(SourceError, match="The source .* cannot be looked up"):
        build(path, tmp_path / "out")
    with pytest.raises(OutputError, match="The output .* cannot be looked up"):
        build(checkpoint, path)
    with pytest.raises(SourceError, match="The adapter .* cannot be looked up"):
        build(checkpoint, tmp_path / "out", adapter=path)
    with pytest.raises(SourceError, match="The source .* cannot be looked up"):
        build(checkpoint, tmp_path / "out", processor=path)
    with pytest.raises(UsageError, match="The recipe .* cannot be looked up"):
        Recipe.from_toml(path)
    with pytest.raises(vlmbuild.VlmbuildError, match="The artifact .* cannot be looked up"):
        vlmbuild.load(path)
    assert os.listdir(tmp_path) == []


# The dtype of an artifact -------------------------------------------------------------------------------------------


def test_an_artifact_keeps_its_dtype_unless_another_is_given(run, plain, checkpoint, tmp_path):
    assert build(plain.path, tmp_path / "kept").manifest.recipe["dtype"] == "float32"
    assert vlmbuild.plan(plain.path, Recipe(quantize=QuantSpec())).recipe.dtype == "float32"
    assert vlmbuild.plan(plain.path, Recipe(dtype="float16")).recipe.dtype == "float16"
    assert vlmbuild.plan(checkpoint).recipe.dtype == "bfloat16"
    code, *_ = run("build", plain.path, "-o", tmp_path / "cli", "--quantize", "nf4", "--skip", "*.o_proj")
    assert (code, vlmbuild.verify(tmp_path / "cli").recipe["dtype"]) == (0, "float32")
    recipe = Recipe()
    assert recipe.changed(target="onnx").dtype == "float32"
    assert recipe.changed(attention="sdpa").with_source_dtype("float16").dtype == "float16"
    assert Recipe(dtype="bfloat16").with_source_dtype("float32").dtype == "bfloat16"
    assert Recipe(target="onnx").with_source_dtype("bfloat16").dtype == "float32"

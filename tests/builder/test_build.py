"""Building: the same bytes everywhere, every layout of a source, and clear refusals that leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from checkpoints import as_shards, copied, dequantized, edit_config, edit_weights
from parity import MODEL_FP32, SAME_WEIGHTS_FP32, assert_close
from safetensors.torch import load_file, save_file
from tiny import ATTENDED, BATCH, flat
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from vlmbuild import load, verify
from vlmbuild.builder.build import build
from vlmbuild.errors import OutputError, PassError, SourceError
from vlmbuild.recipe import QuantSpec, Recipe

FLOAT32 = Recipe(dtype="float32")


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits[ATTENDED]


def test_unquantized_artifact_is_the_model(plain, reference):
    model, _ = load(plain.path)
    assert_close(logits(model), logits(reference), MODEL_FP32)
    theirs = AutoModelForImageTextToText.from_pretrained(plain.path)
    assert torch.equal(logits(theirs), logits(reference.eval()))


def test_nf4_artifact_opens_with_transformers_and_is_the_same_model(nf4):
    theirs = AutoModelForImageTextToText.from_pretrained(nf4.path)
    kinds = {name: type(module).__name__ for name, module in theirs.named_modules()}
    assert kinds["model.language_model.layers.0.self_attn.q_proj"] == "Linear4bit"
    assert kinds["model.visual.blocks.0.mlp.fc1"] == "Linear"
    assert kinds["model.visual.merger.mlp.0"] == "Linear"
    assert kinds["lm_head"] == "Linear"
    model, _ = load(nf4.path)
    assert_close(logits(model), logits(dequantized(theirs)), SAME_WEIGHTS_FP32)


def test_quantization_is_felt(nf4, reference):
    model, _ = load(nf4.path)
    assert (logits(model) - logits(reference)).norm() > 0.01 * logits(reference).norm()


def test_packed_bytes_are_those_that_transformers_writes(nf4, checkpoint, tmp_path):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.visual"],
    )
    AutoModelForImageTextToText.from_pretrained(
        checkpoint, quantization_config=config, dtype=torch.float32
    ).save_pretrained(tmp_path)
    theirs, ours = load_file(tmp_path / "model.safetensors"), load_file(nf4.path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert sum(name.endswith("bitsandbytes__nf4") for name in ours) == 21
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def shards_in_a_folder_with_current_names_and_old_buffers(directory):
    edit_weights(
        directory, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    as_shards(
        directory, lambda name: f"model.language_model.{name[6:]}" if name.startswith("model.") else f"model.{name}"
    )
    (directory / "weights").mkdir()
    index = directory / "model.safetensors.index.json"
    for shard in directory.glob("model-*.safetensors"):
        shard.rename(directory / "weights" / shard.name)
    index.write_text(index.read_text().replace("model-0", "weights/model-0"))


def flat_config(directory):
    file = directory / "config.json"
    file.write_text(json.dumps(flat(json.loads(file.read_text()))))
    as_shards(directory)


@pytest.mark.parametrize("layout", [shards_in_a_folder_with_current_names_and_old_buffers, flat_config])
def test_every_published_layout_gives_the_same_weights(layout, plain, checkpoint, tmp_path):
    source = copied(checkpoint, tmp_path / "source")
    layout(source)
    built = build(source, tmp_path / "out", FLOAT32)
    same = {"model.safetensors", "graph/program.json", "graph/program.txt"}
    assert [e for e in built.manifest.files if e.path in same] == [e for e in plain.manifest.files if e.path in same]


def test_bfloat16_and_processor_files(checkpoint, tmp_path):
    built = build(checkpoint, tmp_path / "out")
    tensors = load_file(built.path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((built.path / "config.json").read_text())["dtype"] == "bfloat16"
    model, processor = load(built.path)
    assert model.dtype == torch.bfloat16
    assert processor.tokenizer.convert_tokens_to_ids("<|image_pad|>") > 0
    assert processor.chat_template


# Sources that cannot be used ----------------------------------------------------------------------------------------


def truncate(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def only_pickle(directory):
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")


def missing_shard(directory):
    as_shards(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, r"model.safetensors.*truncated|truncated.*model.safetensors"),
        (only_pickle, r"pickle.*save_pretrained"),
        (missing_shard, r"model-00002-of-00002.safetensors"),
        (lambda d: (d / "model.safetensors").unlink(), r"model.safetensors"),
        (lambda d: (d / "config.json").unlink(), r"config.json cannot be read"),
        (lambda d: (d / "config.json").write_text("{"), r"config.json is not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), r"holds list, not a JSON object"),
        (lambda d: edit_config(d, lambda v: v.update(architectures=["T5"])), r"unknown architecture T5.*Qwen2VLFor"),
        (
            lambda d: edit_config(d, lambda v: v.update(quantization_config={"quant_method": "gptq"})),
            "quantized with gptq",
        ),
        (
            lambda d: edit_weights(d, lambda t: t.update({"model.norm.weight": torch.ones(256, dtype=torch.int8)})),
            r"model.norm.weight is torch.int8",
        ),
        (lambda d: edit_weights(d, lambda t: t.pop("model.norm.weight")), r"lacks model.norm.weight"),
        (
            lambda d: edit_weights(d, lambda t: t.update({"model.norm.weight": torch.ones(7)})),
            r"model.norm.weight has shape \[7\].*asks for \[256\]",
        ),
        (lambda d: edit_weights(d, lambda t: t.update({"model.layers.9.x": torch.ones(7)})), r"model.layers.9.x"),
    ],
)
def test_unusable_sources_are_named_and_leave_nothing(spoil, message, checkpoint, tmp_path):
    source = copied(checkpoint, tmp_path / "source")
    spoil(source)
    with pytest.raises(SourceError, match=f"(?s){message}"):
        build(source, tmp_path / "out", FLOAT32)
    assert os.listdir(tmp_path) == ["source"]


def test_nan_in_a_quantized_weight_is_named(checkpoint, tmp_path):
    source = copied(checkpoint, tmp_path / "source")
    edit_weights(source, lambda t: t["model.layers.1.mlp.up_proj.weight"][0, 0].fill_(float("nan")))
    with pytest.raises(SourceError, match=r"layers.1.mlp.up_proj.weight holds NaN"):
        build(source, tmp_path / "out", Recipe(quantize=QuantSpec()))
    assert os.listdir(tmp_path) == ["source"]


def test_output_that_exists_needs_overwrite(plain, checkpoint, tmp_path):
    shutil.copytree(plain.path, tmp_path / "out")
    with pytest.raises(OutputError, match="--overwrite"):
        build(checkpoint, tmp_path / "out")
    assert verify(tmp_path / "out").id == plain.manifest.id
    assert build(checkpoint, tmp_path / "out", overwrite=True).manifest.id != plain.manifest.id


def test_no_space_is_known_before_writing(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(OutputError, match="Not enough space"):
        build(checkpoint, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_required_pass_must_match(checkpoint, tmp_path):
    build(checkpoint, tmp_path / "out", Recipe(require=("fuse_rope", "swap_attention")))
    with pytest.raises(PassError, match="'quantize_linear' is not part of this build"):
        build(checkpoint, tmp_path / "other", Recipe(require=("quantize_linear",)))
    assert os.listdir(tmp_path) == ["out"]


def test_tied_head_stored_twice_is_accepted(checkpoint, plain, tmp_path):
    source = copied(checkpoint, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    built = build(source, tmp_path / "out", FLOAT32)
    assert built.manifest.entry("model.safetensors") == plain.manifest.entry("model.safetensors")

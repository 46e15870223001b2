"""Merging an adapter: the new artifact is source and adapter together, or nothing is published."""

from __future__ import annotations

import json
import os
import shutil

import peft
import pytest
import torch
from adapters import answer_logits, edit_adapter, edit_adapter_config, write_adapter
from parity import MODEL_FP32, SAME_WEIGHTS_FP32, assert_close
from processors import photographs
from safetensors.torch import load_file
from tiny import FAMILY
from transformers import AutoModelForImageTextToText

import vlmbuild
from vlmbuild.adapters.merge import Merge, read_merge
from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.builder.build import build
from vlmbuild.cli import main
from vlmbuild.errors import ParityError, SourceError, UsageError
from vlmbuild.measure.merge_parity import TOLERANCES
from vlmbuild.quant.spec import QuantSpec
from vlmbuild.recipe import Recipe
from vlmbuild.targets import weights as transfer

FLOAT32 = Recipe(dtype="float32")
NF4 = Recipe(quantize=QuantSpec(), dtype="float32")
QWEN = "qwen2-vl-digits"
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(zoo_artifact):
    """An artifact in float32."""
    return zoo_artifact(QWEN, dtype="float32").path


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """An adapter of language and vision."""
    return write_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter", vision=True)


@pytest.fixture(scope="module")
def merged(base, adapter, tmp_path_factory):
    """Both merged in float32."""
    return build(base, tmp_path_factory.mktemp("merged") / "merged", FLOAT32, adapter=adapter)


@pytest.fixture(scope="module")
def quantized(zoo_artifact, tmp_path_factory):
    """An NF4 artifact in float32, and an adapter of its query projections alone."""
    folder = tmp_path_factory.mktemp("quantized")
    artifact = zoo_artifact(QWEN, quantize=QuantSpec(), dtype="float32").path
    return artifact, write_adapter(artifact, folder / "adapter", target=["q_proj"], std=0.2)


def adapted(artifact, adapter):
    model, processor = vlmbuild.load(artifact)
    vlmbuild.load_adapter(model, adapter)
    return answer_logits(model, processor)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_within_the_tolerance(dtype, base, adapter, tmp_path):
    """Merge into a checkpoint in another dtype than its own; photographs differ by less than the manifest records."""
    merged = build(QWEN, tmp_path / "merged", Recipe(dtype=dtype), adapter=adapter)
    (record,) = merged.manifest.numerics
    assert 0 < float(record["error"]) < min(TOLERANCES[dtype], 0.1 * float(record["effect"]))
    assert record["dtype"] == dtype
    exact, processor = vlmbuild.load(base)
    vlmbuild.load_adapter(exact, adapter)
    rounded, _ = vlmbuild.load(merged.path, dtype="float32")
    for name in ("astronaut", "rocket"):
        content = [{"type": "image", "image": photographs()[name]}, {"type": "text", "text": "What is it?"}]
        conversation = [[{"role": "user", "content": content}]]
        batch = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            found, expected = (each.eval()(**batch).logits for each in (rounded, exact))
        assert float((found - expected).norm() / expected.norm()) < float(record["worst_token"]), name


def test_requantized_is_what_the_merged_one_becomes(base, adapter, merged, tmp_path):
    at_once = build(base, tmp_path / "at-once", NF4, adapter=adapter)
    later = build(merged.path, tmp_path / "later", NF4)
    assert at_once.manifest.entry("model.safetensors") == later.manifest.entry("model.safetensors")
    (record,) = at_once.manifest.numerics
    assert (record["formats"], record["tolerance"]) == (["nf4"], "")
    assert float(record["error"]) > 1e-3
    assert not later.manifest.numerics


def test_quantized_source_is_dequantized(quantized, tmp_path):
    source, adapter = quantized
    merged = build(source, tmp_path / "merged", FLOAT32, adapter=adapter)
    assert "quantization_config" not in json.loads((merged.path / "config.json").read_text())
    assert_close(answer_logits(*vlmbuild.load(merged.path)), adapted(source, adapter), SAME_WEIGHTS_FP32)
    assert merged.manifest.recipe["quantize"] is None


@pytest.mark.slow
def test_onnx_models_are_source_and_adapter(quantized, tmp_path):
    """Layers with an adapter are rounded again; others of a quantized source keep their bytes where the format is the same."""
    source, adapter = quantized
    merged = build(source, tmp_path / "merged", Recipe(target="onnx", quantize=QuantSpec()), adapter=adapter)
    record = merged.manifest.numerics[-1]
    assert record["case"] == "merged against source and adapter"
    assert float(record["error"]) < float(record["effect"]) / 2
    found, before = (answer_logits(*vlmbuild.load(artifact)) for artifact in (merged.path, source))
    expected = adapted(source, adapter)
    assert float((found - expected).norm()) < float((before - expected).norm()) / 2


@pytest.mark.slow
def test_onnx_models_round_merged_weights(base, adapter, tmp_path):
    built = build(base, tmp_path / "out", Recipe(target="onnx", quantize=QuantSpec("int4")), adapter=adapter)
    record = built.manifest.numerics[-1]
    assert (record["formats"], record["case"]) == (["int4", "int8"], "merged against source and adapter")
    assert float(record["error"]) < float(record["effect"])


@pytest.mark.parametrize("form", ["nf4", "source"])
def test_layers_without_an_adapter_keep_the_sources_bytes(form, quantized, tmp_path):
    source, adapter = quantized
    merged = build(source, tmp_path / "merged", Recipe(quantize=QuantSpec(form), dtype="float32"), adapter=adapter)
    before, after = load_file(source / "model.safetensors"), load_file(merged.path / "model.safetensors")
    rounded = [key for key in after if ".q_proj.weight" in key]
    assert any("quant_state" in key for key in rounded) == (form == "nf4")
    untouched = [key for key in before if ".q_proj.weight" not in key]
    assert len(untouched) > 50
    for key in untouched:
        assert torch.equal(before[key], after[key]), key


def test_another_format_is_refused_only_where_nothing_is_merged(quantized, tmp_path):
    source, adapter = quantized
    with pytest.raises(SourceError, match="k_proj is quantized already"):
        build(source, tmp_path / "out", Recipe(quantize=QuantSpec("int8")), adapter=adapter)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("modules", [("lm_head",), ("visual.merger",)])
def test_parameters_that_were_trained_whole(modules, base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter", target=["q_proj"], modules_to_save=modules, std=0.02)
    merged = build(base, tmp_path / "merged", FLOAT32, adapter=adapter)
    assert_close(answer_logits(*vlmbuild.load(merged.path)), adapted(base, adapter), MODEL_FP32)


def test_manifest_names_the_adapter_and_inputs_decide_the_id(base, adapter, merged, tmp_path):
    elsewhere = shutil.copytree(adapter, tmp_path / "elsewhere")
    (elsewhere / "README.md").write_text("not read")
    again = build(base, tmp_path / "again", FLOAT32, adapter=elsewhere)
    assert again.manifest.id == merged.manifest.id
    record = again.manifest.source[1]
    assert record["uri"] == "adapter"
    assert [file["path"] for file in record["files"]] == ["adapter_config.json", "adapter_model.safetensors"]
    assert vlmbuild.verify(again.path).id == merged.manifest.id


def test_command_line_shows_adapter_and_parity(base, adapter, tmp_path, capsys):
    assert main(["build", str(base), "-o", str(tmp_path / "out"), "--adapter", str(adapter)]) == 0
    shown = capsys.readouterr().out
    assert "effect" in shown and "(no limit)" in shown and "merged" in shown
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "merged      adapter (2 files)" in shown
    assert "none, because an adapter is merged" in shown
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["numerics"]) == 1


def test_clients_of_peft_open_an_adapter_with_its_base(base, adapter):
    processor = vlmbuild.load(base)[1]
    expected = adapted(base, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == (None, str(base))
    for opened in (
        peft.AutoPeftModel.from_pretrained(adapter),
        AutoModelForImageTextToText.from_pretrained(
            adapter, dtype=torch.float32
        ),  # as transformers itself finds adapters
    ):
        assert_close(answer_logits(opened, processor), expected, MODEL_FP32)


def test_adapters_of_other_tasks_are_read_too(base, adapter, tmp_path):
    for number, task in enumerate(("CAUSAL_LM", "FEATURE_EXTRACTION")):
        other = shutil.copytree(adapter, tmp_path / str(number))
        edit_adapter_config(other, task_type=task, auto_mapping=None)
        assert torch.equal(adapted(base, other), adapted(base, adapter))


# Memory -------------------------------------------------------------------------------------------------------------


def test_pieces_do_not_show_and_no_weight_is_in_memory_as_a_whole(base, adapter, merged, tmp_path, monkeypatch):
    counts = []
    read_part = CheckpointWeights.read_part

    def watched(self, name, first, count):
        counts.append(count)
        return read_part(self, name, first, count)

    monkeypatch.setattr(CheckpointWeights, "read_part", watched)
    monkeypatch.setattr(transfer, "_CHUNK", 1000)  # pieces that begin and end within rows
    pieces = build(base, tmp_path / "pieces", FLOAT32, adapter=adapter)
    assert max(counts) == 1000
    one, two = (load_file(built.path / "model.safetensors") for built in (merged, pieces))
    for key, tensor in one.items():
        assert_close(two[key], tensor, 1e-7, key)


# Refusals -----------------------------------------------------------------------------------------------------------


FIRST = f"base_model.model.{Q_PROJ}"


@pytest.fixture(scope="module")
def program(quantized):
    return vlmbuild.load(quantized[0])[0].program


def renamed(tensors):
    return {key.replace("q_proj", "x_proj"): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), "not a readable adapter"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x"), "not a readable adapter"),
        (lambda d: edit_adapter_config(d, use_dora=True), "only plain LoRA.*use_dora"),
        (
            lambda d: edit_adapter(d, lambda t: t.pop(f"{FIRST}.lora_B.weight")),
            "q_proj.lora_B.default.weight is missing",
        ),
        (
            lambda d: edit_adapter(d, lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(4, 7)})),
            r"shape \[4, 7\]",
        ),
        (
            lambda d: edit_adapter(d, lambda t: t[f"{FIRST}.lora_A.weight"][0, 0].fill_(float("nan"))),
            f"{Q_PROJ}.lora_A.default.weight holds NaN",
        ),
        (
            lambda d: (edit_adapter(d, renamed), edit_adapter_config(d, target_modules="all-linear")),
            "x_proj is not a linear layer of the model",
        ),
        (
            lambda d: edit_adapter_config(d, target_modules=["x_proj"]),
            "target_modules .*x_proj.* does not match .*_proj",
        ),
    ],
)
def test_adapters_that_cannot_be_merged(spoil, message, quantized, program, tmp_path):
    adapter = shutil.copytree(quantized[1], tmp_path / "adapter")
    spoil(adapter)
    with pytest.raises(SourceError, match=message):
        read_merge(adapter, program, FAMILY)


def test_what_cannot_be_asked_for(base, adapter, tmp_path):
    with pytest.raises(SourceError, match="is not a folder"):
        build(base, tmp_path / "out", FLOAT32, adapter=tmp_path / "none")
    with pytest.raises(UsageError, match="--quantize auto"):
        build(base, tmp_path / "out", Recipe(quantize=QuantSpec("auto", budget=5.0)), adapter=adapter)
    with pytest.raises(UsageError, match="lies in the adapter's folder"):
        build(base, adapter / "out", FLOAT32, adapter=adapter)


def test_an_adapter_that_changes_during_the_build_is_noticed(quantized, base, tmp_path, monkeypatch):
    adapter = shutil.copytree(quantized[1], tmp_path / "adapter")
    merged = Merge.merged

    def touched(self, *values):
        edit_adapter_config(adapter, base_model_name_or_path="other")
        return merged(self, *values)

    monkeypatch.setattr(Merge, "merged", touched)
    with pytest.raises(SourceError, match="changed while it was merged"):
        build(base, tmp_path / "out", FLOAT32, adapter=adapter)
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_layer_that_is_left_out_is_noticed(base, adapter, tmp_path, monkeypatch):
    merged = Merge.merged
    config = json.loads((adapter / "adapter_config.json").read_text())
    last = max(module for module in config["target_modules"] if "language_model" in module)
    monkeypatch.setattr(
        Merge, "merged", lambda self, n, values, first: values.float() if last in n else merged(self, n, values, first)
    )
    with pytest.raises(ParityError, match="logits differ from those of source and adapter"):
        build(base, tmp_path / "out", FLOAT32, adapter=adapter)
    assert os.listdir(tmp_path) == []

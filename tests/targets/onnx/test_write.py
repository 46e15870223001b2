"""ONNX artifacts against transformers: all families, images of several sizes, padding, generation."""

import json

import onnx
import pytest
import torch
from checkpoints import NAMES
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import vlmbuild
from vlmbuild.demo.digits import Digits
from vlmbuild.demo.task import READ, answers
from vlmbuild.errors import UsageError
from vlmbuild.measure.batches import cases
from vlmbuild.quant.spec import Override
from vlmbuild.report.contents import contents
from vlmbuild.runtime.onnx.sizes import stored_sizes
from vlmbuild.runtime.onnx.weights import OnnxWeights
from vlmbuild.zoo import ZOO

INT8 = "model.language_model.layers.0.self_attn.o_proj.weight"
CHECKPOINTS = (*NAMES, "qwen2_5_vl")
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def pair(request, onnx_artifact, checkpoint_of):
    """(our model and processor, transformers' model)."""
    ours = vlmbuild.load(onnx_artifact(request.param).path)
    theirs = AutoModelForImageTextToText.from_pretrained(checkpoint_of(request.param), dtype=torch.float32).eval()
    return *ours, theirs


def test_logits_and_greedy_tokens_are_those_of_transformers(pair):
    model, processor, theirs = pair
    for case in cases(processor):
        shown = case.batch["attention_mask"].bool()
        with torch.no_grad():
            expected = theirs(**case.batch).logits[shown]
        found = model(**case.batch).logits[shown]
        assert float((found - expected).norm() / expected.norm()) < 1e-5, case.name
        tokens = theirs.generate(**case.batch, **GREEDY)
        assert model.generate(**case.batch, **GREEDY).equal(tokens), case.name


@pytest.mark.parametrize("pair", NAMES, indirect=True)
def test_reads_digits(pair):
    """Batches of the task that the models were trained for, so that a wrong token shows."""
    model, processor, theirs = pair
    samples = Digits("held_out", 5).take(16)
    found = answers(model, processor, READ, samples)
    assert found == answers(theirs, processor, READ, samples)
    assert sum(text == READ.answer(sample.digits) for text, sample in zip(found, samples, strict=True)) >= 13


def test_beams_and_single_logits(pair):
    model, processor, theirs = pair
    batch = list(cases(processor))[1].batch
    options = {**GREEDY, "num_beams": 3}
    assert model.generate(**batch, **options).equal(theirs.generate(**batch, **options))
    whole, last = model(**batch).logits, model(**batch, logits_to_keep=2).logits
    torch.testing.assert_close(last, whole[:, -2:], rtol=1e-5, atol=1e-5)


def test_weights_are_the_sources(pair):
    model, _, theirs = pair
    weights, state = OnnxWeights(model.path), theirs.state_dict()
    names = set(stored_sizes(model.path / "onnx"))
    assert names == {name for name in state if name in names}
    assert len(names) > 40
    for name in sorted(names):
        assert weights.tensor(name).equal(state[name]), name


def test_manifest_says_how_far_it_is(onnx_artifact):
    manifest = onnx_artifact("qwen2-vl-digits").manifest
    logits = [record for record in manifest.numerics if record["output"] == "logits"]
    assert {record["case"] for record in logits} == {
        "one image",
        "several images, padded",
        "some without image",
        "text",
    }
    for record in logits:
        assert float(record["error"]) < float(record["tolerance"]) == 1e-4
        assert (record["seed"], record["top1"], record["greedy"]) == (0, record["tokens"], record["generated"])
    assert {"image_features", "logits"} < {record["output"] for record in manifest.numerics}


def test_models_are_valid_and_weights_lie_in_data_files(onnx_artifact):
    path = onnx_artifact("qwen2-vl-digits").path
    assert sorted(file.name for file in (path / "onnx").iterdir()) == [
        f"{stem}.{end}"
        for stem in ("decoder_model_merged", "embed_tokens", "vision_encoder")
        for end in ("onnx", "onnx_data")
    ]
    for file in (path / "onnx").glob("*.onnx"):
        model = onnx.load(file, load_external_data=False)
        onnx.checker.check_model(str(file))
        inline = sum(len(t.raw_data) for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL)
        assert inline < 16_384, file


@pytest.mark.slow
def test_int4_holds_the_decided_layers_and_says_what_it_loses(onnx_artifact):
    roles = ("language", "vision=int8", "projector=int8", "embedding", "head")
    artifact = onnx_artifact("pixtral-digits", quantize=vlmbuild.QuantSpec("int4", roles=roles))
    model = onnx.load(artifact.path / "onnx/decoder_model_merged_q4.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    config = json.loads((artifact.path / "config.json").read_text())
    assert config["transformers.js_config"]["dtype"] == "q4"  # which is the end of every file's name
    assert {file.stem.rpartition("_")[2] for file in (artifact.path / "onnx").iterdir()} == {"q4"}
    assert artifact.manifest.toolchain["oldest onnxruntime"] == "1.23.2"
    (record,) = (record for record in artifact.manifest.passes if record["name"] == "quantize_linear")
    assert all(decision["format"] for decision in record["decisions"])
    quantized = [decision for decision in record["decisions"] if decision["format"].startswith("int4")]
    embeddings = "model.language_model.embed_tokens"
    modules = {decision["module"] for decision in quantized}
    assert {node.input[1] for node in nodes} == {f"{module}.weight" for module in modules - {embeddings}}
    assert {"lm_head", embeddings} < modules and len(modules) == 23
    assert record["matches"] == len(record["decisions"]) + 1  # rows are looked up with images and without
    assert all(len(node.input) == 3 for node in nodes)
    levels = {a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"}
    tolerances = {record["tolerance"] for record in artifact.manifest.numerics}
    assert (levels, tolerances) == ({4}, {"1e-01"})
    worst = max(float(record["error"]) for record in artifact.manifest.numerics)
    assert 1e-3 < worst < 5e-2
    described = {form for role in contents(artifact.path)["roles"] for form in role["formats"]}
    assert described == {"int4, blocks of 64", "int8"}
    logits = [record for record in artifact.manifest.numerics if record["output"] == "logits"]
    assert all((r["top1"], r["greedy"]) == (r["tokens"], r["generated"]) for r in logits)
    assert all(0.05 < float(decision["error"]) < 0.15 for decision in quantized)
    eight = [float(d["error"]) for d in record["decisions"] if d not in quantized]
    assert eight and max(eight) < 0.015
    shown = {role["role"]: role for role in contents(artifact.path)["roles"]}
    assert all(role["quantized"] / role["parameters"] > 0.75 for role in shown.values())
    sizes = {role: shown[role]["bytes"] / shown[role]["parameters"] for role in ("embedding", "head")}
    assert sizes == dict.fromkeys(sizes, (4 + 32 / 64) / 8)  # codes, and a scale for each block of 64
    source = load_file(ZOO["pixtral-digits"] / "model.safetensors")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    kept = source["language_model.model.layers.1.mlp.up_proj.weight"].float()
    rounded = OnnxWeights(artifact.path).tensor(name)
    assert 0.05 < float((rounded - kept).norm() / kept.norm()) < 0.12


@pytest.mark.parametrize(
    "quantize", [None, pytest.param(vlmbuild.QuantSpec("int4"), marks=pytest.mark.slow)], ids=["float32", "int4"]
)
def test_a_plan_has_the_sizes_of_the_files(quantize, onnx_artifact):
    recipe = {} if quantize is None else {"quantize": quantize}
    planned = vlmbuild.plan("qwen2-vl-digits", vlmbuild.Recipe(target="onnx", **recipe))
    written = onnx_artifact("qwen2-vl-digits", **recipe).manifest.files
    assert planned.files == {entry.path: entry.size for entry in written if entry.role == "weights"}
    assert 0.9 < planned.weight_bytes / sum(planned.files.values()) <= 1  # but for gaps between tensors
    assert planned.memory is None and planned.parameters == vlmbuild.plan("qwen2-vl-digits").parameters


@pytest.mark.slow
def test_int4_reads_digits_and_is_small(onnx_artifact):
    artifact = onnx_artifact("qwen2-vl-digits", quantize=vlmbuild.QuantSpec("int4"))  # its head is tied
    model, processor = vlmbuild.load(artifact.path)
    samples = Digits("held_out", 5).take(16)
    found = answers(model, processor, READ, samples)
    assert sum(text == READ.answer(sample.digits) for text, sample in zip(found, samples, strict=True)) >= 15
    float32 = onnx_artifact("qwen2-vl-digits")
    data = [
        sum(file.stat().st_size for file in (path / "onnx").glob("*.onnx_data"))
        for path in (artifact.path, float32.path)
    ]
    assert data[0] < data[1] / 4
    weights = OnnxWeights(artifact.path)
    assert "model.language_model.embed_tokens.weight" in weights.packed


@pytest.mark.slow
def test_a_quantized_source_is_not_rounded_again(tmp_path):
    spec = vlmbuild.QuantSpec("nf4", overrides=(Override("*.o_proj", "int8"),))
    vlmbuild.build("qwen2-vl-digits", tmp_path / "trainable", vlmbuild.Recipe(quantize=spec, dtype="float32"))
    vlmbuild.build(tmp_path / "trainable", tmp_path / "out", vlmbuild.Recipe(target="onnx"))
    ours = OnnxWeights(tmp_path / "out")
    model, _ = vlmbuild.load(tmp_path / "trainable")
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    from vlmbuild.ops.linear_4bit.dequantize import Packed4bit, dequantize_4bit

    slots = [model.get_buffer(f"{name}{part}") for part in ("", "_absmax", "_nested_absmax", "_nested_offset")]
    shape = ours.tensor(name).shape
    exact = dequantize_4bit(Packed4bit(*slots, shape[1], shape[0], 64, "nf4", torch.float32))
    assert ours.tensor(name).equal(exact)
    codes, scales = (model.get_buffer(f"{INT8}{part}") for part in ("", "_scb"))
    torch.testing.assert_close(ours.tensor(INT8), codes * scales[:, None] / 127, rtol=1e-6, atol=1e-9)
    assert {weight.operator for weight in ours.packed.values()} == {"MatMulBnb4", "MatMulNBits"}


@pytest.mark.slow
def test_float16(onnx_artifact):
    model, processor = vlmbuild.load(onnx_artifact("qwen2-vl-digits", dtype="float16").path)
    batch = list(cases(processor))[1].batch
    logits = model(**batch).logits
    assert logits.dtype == model.dtype == torch.float16
    theirs = AutoModelForImageTextToText.from_pretrained(ZOO["qwen2-vl-digits"], dtype=torch.float32).eval()
    shown = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**batch).logits[shown]
    assert float((logits[shown].float() - expected).norm() / expected.norm()) < 5e-3


def test_same_inputs_give_the_same_artifact(onnx_artifact, tmp_path):
    again = vlmbuild.build("qwen2-vl-digits", tmp_path / "other", vlmbuild.Recipe(target="onnx"))
    assert again.manifest.id == onnx_artifact("qwen2-vl-digits").manifest.id


def test_what_it_cannot_do_is_refused():
    for options, message in (
        ({"target": "onnx", "dtype": "bfloat16"}, "float32 or float16"),
        ({"target": "onnx", "attention": "triton"}, "--target trainable"),
        ({"quantize": vlmbuild.QuantSpec("int4")}, "--target onnx"),
    ):
        with pytest.raises(UsageError, match=message):
            vlmbuild.Recipe(**options)
    assert vlmbuild.Recipe(target="onnx").dtype == "float32"
    assert vlmbuild.Recipe().dtype == "bfloat16"


def test_loaded_model_says_what_it_is_not(pair):
    model, processor, _ = pair
    batch = next(iter(cases(processor))).batch
    with pytest.raises(UsageError, match="computes no loss"):
        model(**batch, labels=batch["input_ids"])
    with pytest.raises(UsageError, match="dynamic cache"):
        model.generate(**batch, cache_implementation="static", **GREEDY)
    with pytest.raises(UsageError, match="float32. Leave dtype out"):
        vlmbuild.load(model.path, dtype="float16")

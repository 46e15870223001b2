"""GGUF artifacts: files, types, values, metadata, and what is refused."""

from __future__ import annotations

import json

import gguf
import pytest
import torch

import vlmbuild
from vlmbuild.checkpoint.checkpoint import Checkpoint
from vlmbuild.families.gguf import GgufPart
from vlmbuild.runtime.gguf.layout import ENGINE_FILE, MODEL, TOWER, GgufTensor
from vlmbuild.runtime.gguf.weights import GgufWeights
from vlmbuild.targets.gguf.header import stored
from vlmbuild.zoo import ZOO

SOURCE = ZOO["qwen2-vl-digits"]
SPEC = vlmbuild.QuantSpec("q8_0", roles=("language", "embedding", "head", "vision=q4_0"))
DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")

    def build(name, **options):
        recipe = vlmbuild.Recipe(target="gguf", **options)
        return vlmbuild.build(SOURCE, folder / name, recipe, overwrite=True)

    return build


@pytest.fixture(scope="module")
def q8_0(built):
    return built("q8_0", quantize=SPEC)


@pytest.fixture(scope="module")
def source():
    checkpoint = Checkpoint.open(SOURCE)
    return {
        name: tensor.whole(checkpoint.weights, torch.float32).float() for name, tensor in checkpoint.tensors.items()
    }


def reader(artifact, file=MODEL):
    return gguf.GGUFReader(artifact.path / file)


def value(artifact, key, file=MODEL):
    return reader(artifact, file).fields[key].contents()


def test_plain_values_are_the_sources(built, source):
    artifact = built("plain", dtype="bfloat16")
    weights = GgufWeights(artifact.path)
    assert all(torch.equal(weights.tensor(name), expected) for name, expected in source.items())
    types = {
        tensor.name: tensor.tensor_type.name for file in (MODEL, TOWER) for tensor in reader(artifact, file).tensors
    }
    assert types["blk.0.attn_q.weight"] == types["v.blk.0.attn_q.weight"] == "BF16"
    assert types["blk.0.attn_norm.weight"] == types["blk.0.attn_q.bias"] == types["v.patch_embd.weight"] == "F32"
    assert value(artifact, "general.file_type") == gguf.LlamaFileType.MOSTLY_BF16


@pytest.mark.parametrize(
    ("name", "shape", "types"),
    [
        ("blk.0.attn_q.weight", (64, 64), ("F32", "F16", "BF16")),
        ("blk.0.attn_norm.weight", (64,), ("F32", "F32", "F32")),
        ("v.position_embd.weight", (16, 64), ("F32", "F32", "F32")),
        ("v.patch_embd.weight.1", (64, 3, 14, 14), ("F32", "F16", "F32")),
        ("mm.input_projection.weight", (64, 64), ("F32", "F16", "F16")),
    ],
)
def test_types_follow_the_dtype_where_llama_cpp_can(name, shape, types):
    tensor = GgufTensor(MODEL, name, shape, "w", shape, GgufPart(name))
    assert tuple(stored(tensor, dtype, None).type.name for dtype in DTYPES) == types
    assert stored(tensor, "float32", None).nbytes == 4 * torch.Size(shape).numel()


def test_quantized_values_are_rounded_once(q8_0, source):
    weights, types = GgufWeights(q8_0.path), {tensor.name: tensor.tensor_type.name for tensor in reader(q8_0).tensors}
    assert types["blk.1.ffn_down.weight"] == types["token_embd.weight"] == "Q8_0"
    towers = {tensor.name: tensor.tensor_type.name for tensor in reader(q8_0, TOWER).tensors}
    assert (towers["v.blk.0.attn_k.weight"], towers["mm.0.weight"], towers["v.post_ln.weight"]) == (
        "Q4_0",
        "F16",
        "F32",
    )
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    rounded = gguf.quants.quantize(source[name].numpy(), gguf.GGMLQuantizationType.Q8_0)
    expected = gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(weights.tensor(name), torch.from_numpy(expected))
    decisions = next(each["decisions"] for each in q8_0.manifest.passes if "decisions" in each)
    error = next(each["error"] for each in decisions if f"{each['module']}.weight" == name)
    assert 0 < float(error) < 0.01


def test_the_bytes_are_the_same_again(built, q8_0):
    again = built("again", quantize=SPEC)
    assert again.manifest.id == q8_0.manifest.id


def test_missing_weights_are_named(q8_0):
    weights = GgufWeights(q8_0.path)
    with pytest.raises(vlmbuild.VlmbuildError, match="no.such.weight"):
        weights.tensor("no.such.weight")


def test_metadata(q8_0):
    assert value(q8_0, "general.architecture") == "qwen2vl"
    assert value(q8_0, "qwen2vl.rope.dimension_sections") == [16, 24, 24, 0]
    assert value(q8_0, "qwen2vl.block_count") == 3
    assert value(q8_0, "tokenizer.ggml.pre") == "qwen2"
    assert len(value(q8_0, "tokenizer.ggml.tokens")) == 320
    assert value(q8_0, "tokenizer.ggml.eos_token_id") == 306
    assert value(q8_0, "tokenizer.chat_template") == (SOURCE / "chat_template.jinja").read_text()
    assert value(q8_0, "clip.projector_type", TOWER) == "qwen2vl_merger"
    assert value(q8_0, "clip.vision.image_mean", TOWER) == [1.0, 1.0, 1.0]
    assert value(q8_0, "clip.vision.feed_forward_length", TOWER) == 256


def test_files_for_engines(q8_0):
    settings = json.loads((q8_0.path / ENGINE_FILE).read_text())
    assert settings["image_tokens"] == [4, 64]
    assert settings["arguments"][-1] == "64"
    modelfile = (q8_0.path / "Modelfile").read_text()
    assert "FROM ./model.gguf\nFROM ./mmproj.gguf\n" in modelfile
    assert 'PARAMETER stop "<|im_end|>"' in modelfile


def test_it_is_not_loaded_here(q8_0):
    with pytest.raises(vlmbuild.VlmbuildError, match=r"llama\.cpp"):
        vlmbuild.load(q8_0.path)


def test_inspection_knows_sizes(q8_0, run):
    code, out, _ = run("inspect", q8_0.path, "--json")
    assert code == 0
    language = next(role for role in json.loads(out)["roles"] if role["role"] == "language")
    assert language["bytes"] > 0


@pytest.mark.parametrize(
    ("path", "changed", "said"),
    [
        (("vision_config", "spatial_merge_size"), 1, "spatial_merge_size"),
        (("vision_config", "hidden_act"), "gelu", "quick_gelu"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path, path, changed, said):
    config = Checkpoint.open(SOURCE).values
    values = {**config, path[0]: {**config[path[0]], path[1]: changed}}
    family = Checkpoint.open(SOURCE).family
    with pytest.raises(vlmbuild.VlmbuildError, match=said):
        family.gguf_model(family.config(values))

"""The bitsandbytes layout: the library's own bytes, known sizes, strict parsing, a config that transformers reads."""

from __future__ import annotations

import json

import pytest
import torch

from vlmbuild.artifact.bitsandbytes_format import (
    is_skipped,
    parse_quant_state,
    quantization_config,
    quantize,
    stored_specs,
)
from vlmbuild.artifact.weights import CheckpointWeights, WeightsWriter
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.errors import SourceError, UsageError

functional = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(3, 67), (1, 1), (200, 1024)]
OPTIONS = [
    {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
    for quant_type in ("nf4", "fp4")
    for blocksize in (64, 128)
    for double_quant in (True, False)
]


def weight(shape, dtype=torch.bfloat16, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def reference(tensor, *, quant_type, blocksize, double_quant):
    packed, state = functional.quantize_4bit(
        tensor, blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type
    )
    return {"": packed, **{f".{key}": value for key, value in state.as_dict(packed=True).items()}}


def equal(one, two):
    assert list(one) == list(two)
    for key, tensor in one.items():
        assert tensor.dtype == two[key].dtype, key
        assert torch.equal(tensor, two[key]), key


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bytes_as_the_library(shape, dtype, options):
    tensor = weight(shape, dtype)
    stored = quantize(tensor, **options)
    equal(stored, reference(tensor, **options))
    equal(stored, quantize(tensor, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_are_known_beforehand(shape, options):
    stored = quantize(weight(shape), **options)
    specs = {spec.name: spec for spec in stored_specs("w.weight", shape, torch.bfloat16, **options)}
    assert set(specs) == {f"w.weight{suffix}" for suffix in stored}
    for suffix, tensor in stored.items():
        spec = specs[f"w.weight{suffix}"]
        assert tensor.dtype == spec.dtype
        if spec.exact:
            assert tuple(tensor.shape) == spec.shape
        else:
            assert tensor.numel() <= spec.shape[0]


def test_the_number_of_threads_does_not_show():
    tensor = weight((1536, 2 * 1536))  # enough scales for their sum to be shared among threads
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(quantize(tensor))
            assert torch.get_num_threads() == threads
        torch.set_num_threads(1)
        equal(results[0], reference(tensor, quant_type="nf4", blocksize=64, double_quant=True))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        equal(result, results[0])


def test_strided_weights():
    tensor = weight((64, 128)).T
    equal(quantize(tensor), quantize(tensor.contiguous()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    tensor = weight((64, 64))
    tensor[3, 5] = value
    with pytest.raises(SourceError, match="The tensor q.weight holds NaN or infinity. Repair"):
        quantize(tensor, name="q.weight")


def test_weights_of_other_dtypes():
    with pytest.raises(SourceError, match="The tensor q.weight is torch.int8, which cannot be quantized"):
        quantize(torch.zeros(64, 64, dtype=torch.int8), name="q.weight")


@pytest.mark.parametrize(
    "call", [lambda **options: quantize(weight((64, 64)), **options), lambda **options: stored_specs(
        "w", (1, 1), torch.float32, **options)]
)  # fmt: skip
def test_unknown_options(call):
    with pytest.raises(UsageError, match="format 'int4' is unknown. Choose from nf4, fp4"):
        call(quant_type="int4")
    with pytest.raises(UsageError, match="block size 65 is not possible. Choose from 32, 64"):
        call(blocksize=65)


def test_streamed_to_a_file_and_back(tmp_path):
    weights = {f"layers.{number}.weight": weight((96, 130), seed=number) for number in range(3)}
    specs = [spec for name in weights for spec in stored_specs(name, (96, 130), torch.bfloat16)]
    ids = set()
    for output in ("one", "two"):
        with ArtifactWriter(tmp_path / output) as writer:
            with WeightsWriter(writer, specs, shard_bytes=10_000) as stored:
                for name, tensor in weights.items():
                    for suffix, part in quantize(tensor).items():
                        stored.add(f"{name}{suffix}", part)
            ids.add(writer.publish(name="m", target="trainable").id)
    assert len(ids) == 1
    checkpoint = CheckpointWeights(tmp_path / "one")
    assert len(checkpoint.files) > 1
    for name, tensor in weights.items():
        parts = {key: checkpoint.read(key) for key in checkpoint.tensors if key.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(parts, torch.device("cpu"))
        read = functional.dequantize_4bit(checkpoint.read(name), state)
        packed, own = functional.quantize_4bit(tensor, compress_statistics=True, quant_type="nf4")
        assert torch.equal(read, functional.dequantize_4bit(packed, own))


def state_of(**changes):
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [64, 128],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.25,
    }
    state.update(changes)
    text = json.dumps({key: value for key, value in state.items() if value is not ...})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("double_quant", [True, False])
def test_parsing_what_was_written(double_quant):
    stored = quantize(weight((64, 128)), double_quant=double_quant)
    state = parse_quant_state(stored[".quant_state.bitsandbytes__nf4"])
    assert (state["quant_type"], state["blocksize"], state["dtype"], state["shape"]) == (
        "nf4",
        64,
        torch.bfloat16,
        (64, 128),
    )
    if double_quant:
        assert (state["nested_blocksize"], state["nested_dtype"]) == (256, torch.float32)
        assert 0 < state["nested_offset"] < 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_type": "int4"}, "quant_type is 'int4'"),
        ({"quant_type": []}, r"quant_type is \[\]"),
        ({"blocksize": 63}, "blocksize is 63"),
        ({"blocksize": 64.0}, "blocksize is 64.0"),
        ({"dtype": "load"}, "dtype is 'load'"),
        ({"shape": [64, -1]}, r"shape is \[64, -1\]"),
        ({"shape": None}, "shape is None"),
        ({"nested_blocksize": 1}, "nested_blocksize is 1"),
        ({"nested_dtype": "bfloat16"}, "nested_dtype is 'bfloat16'"),
        ({"nested_offset": "1"}, "nested_offset is '1'"),
        ({"nested_offset": float("nan")}, "NaN is not a finite number"),
        ({"nested_offset": ...}, "does not have exactly the keys blocksize, dtype, quant_type, shape, or also"),
        ({"more": 1}, "does not have exactly the keys"),
    ],
)
def test_states_that_are_refused(changes, words):
    with pytest.raises(SourceError, match=f"state q.weight cannot be used: .*{words}.*Quantize the checkpoint again"):
        parse_quant_state(state_of(**changes), name="q.weight")


@pytest.mark.parametrize("tensor", [torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8)])
def test_states_that_are_not_bytes(tensor):
    with pytest.raises(SourceError, match="not a short line of bytes"):
        parse_quant_state(tensor)
    with pytest.raises(SourceError, match="cannot be used"):
        parse_quant_state(torch.tensor([123, 255], dtype=torch.uint8))
    twice = torch.tensor(list(b'{"dtype":"float32","dtype":"float32"}'), dtype=torch.uint8)
    with pytest.raises(SourceError, match="'dtype' comes twice"):
        parse_quant_state(twice)


def test_config_is_what_transformers_reads_and_writes():
    config_class = pytest.importorskip("transformers").BitsAndBytesConfig
    config = quantization_config(skip_modules=["model.visual.merger.mlp.0", "lm_head"], compute_dtype="float16")
    parsed = config_class.from_dict(dict(config))
    written = {key: value for key, value in parsed.to_dict().items() if not key.startswith("_")}
    assert json.loads(json.dumps(written)) == config
    assert parsed.quantization_method() == "nf4"
    assert config["llm_int8_skip_modules"] == ["lm_head", "model.visual.merger.mlp.0"]


def test_skipping_follows_transformers():
    should_convert = pytest.importorskip("transformers.quantizers.quantizers_utils").should_convert_module
    skips = ["lm_head", "model.visual", "model.layers.1.mlp", "model.layers.1"]
    names = ["lm_head", "model.lm_head", "model.visual.blocks.0.attn.qkv", "model.visual2.x", "model.layers.1.q",
             "model.layers.11.q", "model.layers.1", "x.model.layers.1", "model", "lm_head2"]  # fmt: skip
    for name in names:
        assert is_skipped(name, skips) != should_convert(name, skips), name
    assert not is_skipped("lm_head", [])
    assert should_convert("lm_head", [])


def test_config_errors():
    with pytest.raises(UsageError, match=r"module name 'layers\.\*' in the skip list is not a plain dotted name"):
        quantization_config(skip_modules=["layers.*"])
    with pytest.raises(UsageError, match="compute dtype 'float8' is unknown. Choose from float32"):
        quantization_config(skip_modules=[], compute_dtype="float8")
    with pytest.raises(UsageError, match="format 'int4' is unknown"):
        quantization_config(skip_modules=[], quant_type="int4")

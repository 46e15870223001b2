"""The 4-bit layout of bitsandbytes: the library's own bytes, known sizes, strict parsing."""

from __future__ import annotations

import json

import pytest
import torch
from quantized import assert_same_tensors, quantize, reference

from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.artifact.weights_writer import WeightsWriter
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.errors import SourceError
from vlmbuild.formats import FourBit
from vlmbuild.quant.bnb_4bit import parse_quant_state, stored_specs

functional = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(3, 67), (1, 1), (200, 1024)]
FORMATS = [
    FourBit(name, size, nested) for name in ("nf4", "fp4") for size in (64, 128, 4096) for nested in (True, False)
]


def weight(shape, dtype=torch.bfloat16, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bytes_as_the_library(shape, dtype, form):
    tensor = weight(shape, dtype)
    assert_same_tensors(quantize(tensor, form), reference(tensor, form))


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_are_known_beforehand(shape, form):
    stored = quantize(weight(shape), form)
    specs = {spec.name: spec for spec in stored_specs("w.weight", shape, torch.bfloat16, form)}
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
        assert_same_tensors(results[0], reference(tensor))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_tensors(result, results[0])


def test_streamed_to_a_file_and_back(tmp_path):
    weights = {f"layers.{number}.weight": weight((96, 130), seed=number) for number in range(3)}
    specs = [spec for name in weights for spec in stored_specs(name, (96, 130), torch.bfloat16, FourBit())]
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
    stored = quantize(weight((64, 128)), FourBit(double_quant=double_quant))
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

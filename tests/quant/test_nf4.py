"""The 4-bit layout of bitsandbytes: the library's own bytes, known sizes."""

from __future__ import annotations

import pytest
import torch
from quantized import assert_same_tensors, quantize, reference

from vlmbuild.artifact.weights_reader import CheckpointWeights
from vlmbuild.artifact.weights_writer import WeightsWriter
from vlmbuild.artifact.writer import ArtifactWriter
from vlmbuild.quant.nf4 import FP4, NF4

functional = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(3, 67), (1, 1), (200, 1024)]
FORMATS = [cls(size, nested) for cls in (NF4, FP4) for size in (64, 128, 4096) for nested in (True, False)]


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
    specs = {spec.name: spec for spec in form.parts("w", shape, torch.bfloat16)}
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
    specs = [spec for name in weights for spec in NF4().parts(name.removesuffix(".weight"), (96, 130), torch.bfloat16)]
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
